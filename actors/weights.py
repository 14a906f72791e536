"""Loads one shard's weights: everything but the routed experts whole, or its slice of what is sliced in tensor-parallel
attention, and of those only the shard's own.

Each tensor's own bytes are read, ahead of their use by another thread, and converted right into the shard's stacked
matrices, so that beside the result little more than what is read ahead is alive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..kernels.cpu.converter import CpuConverter
from ..kernels.protocol import Kernels, LinearWeight
from .checkpoint import Checkpoint
from .linear_kinds import check_linear_kinds, linear_kind
from .model.config import ModelConfig
from .model.expert_blocks import ExpertBlocks
from .model.expert_reader import ExpertReader
from .model.layer_weights import AttentionWeights, LayerWeights, MlpWeights, MoeWeights, ShardWeights
from .model.linear_reader import LinearReader
from .model.tensor_slice import TensorSlice
from .model.tensors import check_tensors, shard_tensors
from .model.weight_memory import WeightMemory
from .precision import check_int4_weights, memory_format
from .quantization_config import MIXED

Progress = Callable[[int, int], None]


def load_shard(
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: str,
    experts: Sequence[int],
    kernels: Kernels,
    progress: Progress | None = None,
    threads: int = 1,
    int8_weights: Collection[str] = (),
    int4_weights: Collection[str] = (),
    tensor: TensorSlice | None = None,
) -> ShardWeights:
    """Reads a shard's weights to the backend's device.

    precision: "auto" or a format that `precision.memory_format` allows. experts: those of every layer that this shard
    holds, by slot. progress: called with (bytes done, bytes total), first with 0 done. threads: what
    converting may use. int8_weights: kinds of `LINEAR_KINDS` that become INT8 where they are not already; int4_weights:
    others that become INT4. tensor: what a shard has with tensor-parallel attention of what is sliced; None: all.
    Raises CheckpointError (before anything is read for what the headers show: missing, misshaped or mistyped
    tensors), PrecisionError, or ValueError for experts that the model has not, or none, or one twice.
    """
    if not experts or len(set(experts)) < len(experts) or not set(experts) <= set(range(config.n_routed_experts)):
        raise ValueError(f"experts {list(experts)} are not different ones within 0..{config.n_routed_experts - 1}")
    check_linear_kinds(int8_weights, int4_weights)
    formats = checkpoint.formats
    memory = memory_format(formats.experts, precision)
    specs = tuple(shard_tensors(config, formats, experts))
    check_tensors(checkpoint, specs)
    check_int4_weights(config, checkpoint, int4_weights)
    names = [spec.name for spec in specs if checkpoint.has(spec.name)]
    with checkpoint.only_rows({} if tensor is None else tensor.rows(config)):
        total = sum(checkpoint.entry(name).bytes for name in names)
        with one_torch_thread(), checkpoint.reading_ahead(names):
            loading = _Loading(checkpoint, config, memory, experts, kernels, threads, progress, total)
            return loading.shard(frozenset(int8_weights), frozenset(int4_weights))


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
        experts: Sequence[int],
        kernels: Kernels,
        threads: int,
        progress: Progress | None,
        total: int,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._format = memory
        self._experts = experts
        self._memory = WeightMemory(kernels.device)
        converter = CpuConverter(threads)
        self._linears = LinearReader(checkpoint, self._memory, converter, self._report)
        self._routed_reader = ExpertReader(checkpoint, config, kernels, self._memory, converter, self._report)
        self._progress = progress
        self._total = total
        self._before = checkpoint.bytes_read

    def shard(self, int8_weights: frozenset[str], int4_weights: frozenset[str]) -> ShardWeights:
        """Everything in the order of `shard_tensors`, which is that of reading ahead."""
        self._int8, self._int4 = int8_weights, int4_weights
        self._report()
        embed, norm = self._read("model.embed_tokens.weight"), self._read("model.norm.weight")
        head = self._linear("lm_head")
        layers = tuple(self._layer(layer) for layer in range(self._config.num_hidden_layers))
        return ShardWeights(embed, head, norm, layers, tuple(self._experts))

    def _layer(self, layer: int) -> LayerWeights:
        at = f"model.layers.{layer}"
        attention, post_norm = self._attention(at), self._read(f"{at}.post_attention_layernorm.weight")
        mlp = self._moe(layer) if layer in self._config.moe_layers else self._mlp(f"{at}.mlp")
        return LayerWeights(attention, post_norm, mlp)

    def _attention(self, layer: str) -> AttentionWeights:
        at, config = f"{layer}.self_attn", self._config
        lora = config.q_lora_rank is not None
        down = [f"{at}.q_a_proj"] * lora + [f"{at}.kv_a_proj_with_mqa"]
        key, value = self._absorbed(f"{at}.kv_b_proj.weight")
        return AttentionWeights(
            input_norm=self._read(f"{layer}.input_layernorm.weight"),
            down=self._linear(*down),
            q_norm=self._read(f"{at}.q_a_layernorm.weight") if lora else None,
            q_b=self._linear(f"{at}.q_b_proj" if lora else f"{at}.q_proj"),
            kv_norm=self._read(f"{at}.kv_a_layernorm.weight"),
            w_uk=key,
            w_uv=value,
            output=self._linear(f"{at}.o_proj"),
        )

    def _absorbed(self, name: str) -> tuple[Tensor, Tensor]:
        """kv_b_proj as w_uk and w_uv of `AttentionWeights`."""
        sizes = [self._config.qk_nope_head_dim, self._config.v_head_dim]
        key, value = self._checkpoint.borrow(name).unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
        self._report()
        return self._kept(key.transpose(1, 2)), self._kept(value)

    def _mlp(self, at: str) -> MlpWeights:
        return MlpWeights(self._linear(f"{at}.gate_proj", f"{at}.up_proj"), self._linear(f"{at}.down_proj"))

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
        memory = [formats.matrix(layer, expert) if self._format == MIXED else self._format for expert in self._experts]
        return self._routed_reader.read(layer, self._experts, memory)

    def _linear(self, *names: str) -> LinearWeight:
        """The rows of all of them, one behind another."""
        kind = linear_kind(names[0])
        bits = 4 if kind in self._int4 else 8 if kind in self._int8 else 16
        return self._linears.read(names, bits)

    def _read(self, name: str) -> Tensor:
        entry = self._checkpoint.entry(name)
        tensor, row = self._memory.empty(entry.dtype, *entry.shape), 0
        for piece in self._checkpoint.pieces(name):
            tensor[row : row + len(piece)].copy_(piece)
            row += len(piece)
        self._report()
        return tensor

    def _kept(self, view: Tensor) -> Tensor:
        return self._memory.empty(view.dtype, *view.shape).copy_(view)

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._checkpoint.bytes_read - self._before, self._total)
