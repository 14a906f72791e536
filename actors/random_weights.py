"""Random weights made on the device: a shard of a model whose checkpoint is not here, to be measured.

Norms are 1, and everything else has zero mean and a standard deviation of 0.02, codes of quantized weights included.
With another mean all tokens' hidden states grow alike, and so do the experts that they choose: far fewer are read. A
tensor's values are a function of the seed and its name, so they do not depend on the number of shards.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels.protocol import (
    Bf16Matrix,
    ExpertMatrix,
    ExpertWeights,
    Fp8Matrix,
    Int8Matrix,
    Kernels,
    LinearWeight,
)
from .linear_kinds import check_linear_kinds
from .model.config import ModelConfig
from .model.expert_blocks import ExpertBlocks
from .model.expert_matrix import MATRIX_KINDS, allocate_matrix, integer_weight, matrix_rows
from .model.layer_weights import AttentionWeights, LayerWeights, MlpWeights, MoeWeights, ShardWeights
from .model.tensor_slice import TensorSlice
from .model.tensors import expert_shapes
from .model.weight_memory import WeightMemory

Weight = TypeVar("Weight", Tensor, LinearWeight)

STD = 0.02
_LEAST_MULTIPLIER, _MOST_MULTIPLIER = 8, 15


def random_shard(
    config: ModelConfig,
    format: str,
    experts: Sequence[int],
    kernels: Kernels,
    int8_weights: Collection[str] = (),
    int4_weights: Collection[str] = (),
    seed: int = 0,
    tensor: TensorSlice | None = None,
) -> ShardWeights:
    """What `load_shard` gives for such a checkpoint. experts: those that this shard holds, by slot. format: theirs in
    memory. tensor: as in `load_shard`.

    Raises ValueError for a format or kinds of weights that there are not.
    """
    if format not in MATRIX_KINDS:
        raise ValueError(f"format: {format!r} is unknown; known are {', '.join(MATRIX_KINDS)}")
    check_linear_kinds(int8_weights, int4_weights)
    bits = {**dict.fromkeys(int8_weights, "w8a8"), **dict.fromkeys(int4_weights, "w4a8")}
    whole = TensorSlice(range(config.num_attention_heads), range(config.vocab_size))
    return _Drawing(config, format, experts, kernels, bits, seed, tensor or whole).shard()


def random_experts(
    config: ModelConfig, format: str, layer: int, experts: Sequence[int], kernels: Kernels, seed: int = 0
) -> ExpertBlocks:
    """Those of `random_shard`, by slot."""
    whole = TensorSlice(range(config.num_attention_heads), range(config.vocab_size))
    return _Drawing(config, format, experts, kernels, {}, seed, whole).routed(f"layers.{layer}")


class _Drawing:
    """One run of `random_shard`. linears: the format of each kind of `LINEAR_KINDS` that is not bfloat16."""

    def __init__(
        self,
        config: ModelConfig,
        format: str,
        experts: Sequence[int],
        kernels: Kernels,
        linears: dict[str, str],
        seed: int,
        tensor: TensorSlice,
    ) -> None:
        self._config, self._format, self._experts, self._kernels = config, format, experts, kernels
        self._linears, self._seed = linears, seed
        self._tensor = tensor
        # What is on no device has no values.
        self._generator = None if kernels.device.type == "meta" else torch.Generator(kernels.device)
        self._memory = WeightMemory(kernels.device)

    def shard(self) -> ShardWeights:
        config = self._config
        table = config.vocab_size, config.hidden_size
        embed = self._floats("embed", *table)
        head = _part(self._linear("head", "head", *table), self._tensor.vocabulary)
        layers = tuple(self._layer(layer) for layer in range(config.num_hidden_layers))
        return ShardWeights(embed, head, self._ones(config.hidden_size), layers, tuple(self._experts))

    def _layer(self, layer: int) -> LayerWeights:
        config, at = self._config, f"layers.{layer}"
        moe = layer in config.moe_layers
        mlp = self._moe(at) if moe else self._mlp(f"{at}.mlp", "dense", config.intermediate_size)
        return LayerWeights(self._attention(at), self._ones(config.hidden_size), mlp)

    def _attention(self, at: str) -> AttentionWeights:
        config = self._config
        hidden, heads, rank, inner = config.hidden_size, config.num_attention_heads, config.q_lora_rank, "attention"
        mine = self._tensor.heads
        queries = range(mine.start * config.qk_head_dim, mine.stop * config.qk_head_dim)
        return AttentionWeights(
            input_norm=self._ones(hidden),
            down=self._linear(f"{at}.down", inner, (rank or 0) + config.kv_width, hidden),
            q_norm=None if rank is None else self._ones(rank),
            q_b=_part(self._linear(f"{at}.q_b", inner, heads * config.qk_head_dim, rank or hidden), queries),
            kv_norm=self._ones(config.kv_lora_rank),
            w_uk=_part(self._floats(f"{at}.w_uk", heads, config.kv_lora_rank, config.qk_nope_head_dim), mine),
            w_uv=_part(self._floats(f"{at}.w_uv", heads, config.v_head_dim, config.kv_lora_rank), mine),
            output=self._linear(f"{at}.output", inner, hidden, heads * config.v_head_dim),
        )

    def _mlp(self, at: str, kind: str, inner: int) -> MlpWeights:
        hidden = self._config.hidden_size
        gate_up = self._linear(f"{at}.gate_up", kind, 2 * inner, hidden)
        return MlpWeights(gate_up, self._linear(f"{at}.down", kind, hidden, inner))

    def _moe(self, at: str) -> MoeWeights:
        config = self._config
        return MoeWeights(
            gate=self._floats(f"{at}.gate", config.n_routed_experts, config.hidden_size),
            gate_bias=torch.zeros(config.n_routed_experts, device=self._kernels.device),
            shared=self._mlp(f"{at}.shared", "shared", config.moe_intermediate_size * config.n_shared_experts),
            experts=self.routed(at),
        )

    def routed(self, at: str) -> ExpertBlocks:
        """Layer `at`'s."""
        shapes, count = expert_shapes(self._config), len(self._experts)
        inner, hidden = shapes["gate_proj"]
        gate_up = allocate_matrix(self._format, count, 2 * inner, hidden, self._memory)
        down = allocate_matrix(self._format, count, *shapes["down_proj"], self._memory)
        for place, expert in enumerate(self._experts):
            self._fill(f"{at}.experts.{expert}.gate_up", gate_up, place, 2 * inner)
            self._fill(f"{at}.experts.{expert}.down", down, place, shapes["down_proj"][0])
        weights = self._kernels.prepare(ExpertWeights(gate_up, down))
        return ExpertBlocks.of([(range(count), weights)], self._kernels.device)

    def _linear(self, name: str, kind: str, rows: int, columns: int) -> LinearWeight:
        if kind not in self._linears:
            return self._floats(name, rows, columns)
        matrix = allocate_matrix(self._linears[kind], 1, rows, columns, self._memory)
        self._fill(name, matrix, 0, rows)
        return integer_weight(matrix_rows(matrix, 0, 0, rows))

    def _fill(self, name: str, matrix: ExpertMatrix, place: int, rows: int) -> None:
        """Draws one matrix of a stack."""
        generator, (values, *scales) = self._seeded(name), matrix_rows(matrix, place, 0, rows)
        if isinstance(matrix, Bf16Matrix):
            values.normal_(std=STD, generator=generator)
        elif isinstance(matrix, Fp8Matrix):
            normal = torch.empty(values.shape, device=values.device).normal_(generator=generator)
            values.copy_(normal)
            scales[-1].fill_(STD)
        elif isinstance(matrix, Int8Matrix):
            values.random_(-127, 128, generator=generator)
            scales[-1].fill_(STD / _spread(-127, 127))
        else:
            self._draw_int4(values, scales, generator)

    def _draw_int4(self, nibbles: Tensor, scales: list[Tensor], generator: torch.Generator | None) -> None:
        """Values of -7 to 7, as nibbles 1 to 15, and multipliers that keep them within INT8."""
        multipliers, scale = scales
        nibbles.random_(1, 16, generator=generator)
        nibbles |= torch.empty_like(nibbles).random_(1, 16, generator=generator) << 4
        multipliers.random_(_LEAST_MULTIPLIER, _MOST_MULTIPLIER + 1, generator=generator)
        scale.fill_(STD / (_spread(-7, 7) * _spread(_LEAST_MULTIPLIER, _MOST_MULTIPLIER)))

    def _floats(self, name: str, *shape: int) -> Tensor:
        values = self._memory.empty(torch.bfloat16, *shape)
        return values.normal_(std=STD, generator=self._seeded(name))

    def _ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16, device=self._kernels.device)

    def _seeded(self, name: str) -> torch.Generator | None:
        seed = (self._seed << 32) + zlib.crc32(name.encode())
        return None if self._generator is None else self._generator.manual_seed(seed)


def _part(weight: Weight, rows: range) -> Weight:
    """Some rows of a weight, in memory of their own unless they are all."""
    if isinstance(weight, Tensor):
        return weight if len(rows) == len(weight) else weight[rows.start : rows.stop].clone()
    parts = {name: _part(tensor, rows) for name, tensor in vars(weight).items()}
    return replace(weight, **parts)


def _spread(least: int, most: int) -> float:
    """Root mean square of integers drawn evenly from least..most."""
    return math.sqrt(sum(value * value for value in range(least, most + 1)) / (most - least + 1))
