"""Loads one shard's weights: everything but the routed experts whole, and of those only the shard's own range.

Each tensor's own bytes are read, converted matrix by matrix and copied into the shard's stacked matrices, so that
beside the result never more than one matrix's temporaries are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..kernels.protocol import Int8Weight, Kernels, LinearWeight
from .checkpoint import Checkpoint
from .int8_kinds import check_int8_kinds, linear_kind
from .model.config import ModelConfig
from .model.expert_blocks import ExpertBlocks
from .model.expert_matrix import read_int8
from .model.expert_reader import ExpertReader
from .model.int8_linear import to_int8
from .model.layer_weights import AttentionWeights, LayerWeights, MlpWeights, MoeWeights, ShardWeights
from .model.tensors import check_tensors, shard_tensors
from .precision import memory_format
from .quantization_config import MIXED

Progress = Callable[[int, int], None]


def load_shard(
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: str,
    expert_range: range,
    kernels: Kernels,
    progress: Progress | None = None,
    threads: int = 1,
    int8_weights: Collection[str] = (),
) -> ShardWeights:
    """Reads a shard's weights to the backend's device.

    precision: "auto" or a format that `precision.memory_format` allows. expert_range: the routed experts of every
    layer that this shard holds. progress: called with (bytes done, bytes total), first with 0 done. threads: what
    quantizing native experts may use. int8_weights: kinds of `INT8_KINDS` that become INT8 where they are not already.
    Raises CheckpointError (before anything is read for what the headers show: missing, misshaped or mistyped
    tensors), PrecisionError, or ValueError for an expert range outside the model's.
    """
    if expert_range.step != 1 or not 0 <= expert_range.start < expert_range.stop <= config.n_routed_experts:
        raise ValueError(f"experts {expert_range} are not a range within 0..{config.n_routed_experts}")
    check_int8_kinds(int8_weights)
    formats = checkpoint.formats
    memory = memory_format(formats.experts, precision)
    total = check_tensors(checkpoint, shard_tensors(config, formats, expert_range))
    with one_torch_thread():
        loading = _Loading(checkpoint, config, memory, expert_range, kernels.device, threads, progress, total)
        return loading.shard(frozenset(int8_weights))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Conversions are thousands of short operations: split over threads they gain nothing, and on a machine that is
    busy with other shards' loading each waits for a thread that does not run (tens of times slower, measured)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Loading:
    """One run of `load_shard`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        memory: str,
        experts: range,
        device: torch.device,
        threads: int,
        progress: Progress | None,
        total: int,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._memory = memory
        self._experts = experts
        self._device = device
        self._routed_reader = ExpertReader(checkpoint, config, device, threads, self._report)
        self._progress = progress
        self._total = total
        self._before = checkpoint.bytes_read

    def shard(self, int8_weights: frozenset[str]) -> ShardWeights:
        self._int8 = int8_weights
        self._report()
        # The head first: it is the largest tensor that may be converted, and what that takes is free for the rest.
        head = self._linear("lm_head")
        embed, norm = self._read("model.embed_tokens.weight"), self._read("model.norm.weight")
        layers = tuple(self._layer(layer) for layer in range(self._config.num_hidden_layers))
        return ShardWeights(embed, head, norm, layers, self._experts)

    def _layer(self, layer: int) -> LayerWeights:
        at = f"model.layers.{layer}"
        mlp = self._moe(layer) if layer in self._config.moe_layers else self._mlp(f"{at}.mlp")
        return LayerWeights(self._attention(at), self._read(f"{at}.post_attention_layernorm.weight"), mlp)

    def _attention(self, layer: str) -> AttentionWeights:
        at, config = f"{layer}.self_attn", self._config
        lora = config.q_lora_rank is not None
        # The slices below are copied, so the joined projection itself does not stay.
        up = self._read(f"{at}.kv_b_proj.weight").unflatten(0, (config.num_attention_heads, -1))
        return AttentionWeights(
            input_norm=self._read(f"{layer}.input_layernorm.weight"),
            q_a=self._linear(f"{at}.q_a_proj") if lora else None,
            q_norm=self._read(f"{at}.q_a_layernorm.weight") if lora else None,
            q_b=self._linear(f"{at}.q_b_proj" if lora else f"{at}.q_proj"),
            kv_a=self._linear(f"{at}.kv_a_proj_with_mqa"),
            kv_norm=self._read(f"{at}.kv_a_layernorm.weight"),
            w_uk=up[:, : config.qk_nope_head_dim].transpose(1, 2).clone(memory_format=torch.contiguous_format),
            w_uv=up[:, config.qk_nope_head_dim :].clone(memory_format=torch.contiguous_format),
            output=self._linear(f"{at}.o_proj"),
        )

    def _mlp(self, at: str) -> MlpWeights:
        gate_up = _stacked(self._linear(f"{at}.gate_proj"), self._linear(f"{at}.up_proj"))
        return MlpWeights(gate_up, self._linear(f"{at}.down_proj"))

    def _moe(self, layer: int) -> MoeWeights:
        at = f"model.layers.{layer}.mlp"
        return MoeWeights(
            gate=self._read(f"{at}.gate.weight"),
            gate_bias=self._read(f"{at}.gate.e_score_correction_bias").float(),
            shared=self._mlp(f"{at}.shared_experts"),
            experts=self._routed(layer),
        )

    def _routed(self, layer: int) -> ExpertBlocks:
        formats = self._checkpoint.formats
        memory = [formats.matrix(layer, expert) if self._memory == MIXED else self._memory for expert in self._experts]
        return self._routed_reader.read(layer, self._experts, memory)

    def _linear(self, name: str) -> LinearWeight:
        if name not in self._checkpoint.formats.int8_linears:
            weight = self._read(f"{name}.weight")
            return to_int8(f"{name}.weight", weight) if linear_kind(name) in self._int8 else weight
        values, scale = read_int8(self._checkpoint, name)
        self._report()
        return Int8Weight(values.to(self._device), scale.to(self._device))

    def _read(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name).to(self._device)
        self._report()
        return tensor

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._checkpoint.bytes_read - self._before, self._total)


def _stacked(gate: LinearWeight, up: LinearWeight) -> LinearWeight:
    """One weight of both, the gate's rows first; the checkpoint's formats say that both are in INT8, or neither."""
    if isinstance(gate, Int8Weight) and isinstance(up, Int8Weight):
        return Int8Weight(torch.cat([gate.values, up.values]), torch.cat([gate.scale, up.scale]))
    assert isinstance(gate, Tensor)
    assert isinstance(up, Tensor)
    return torch.cat([gate, up])
