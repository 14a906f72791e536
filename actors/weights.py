"""Loads one shard's weights: everything but the routed experts whole, and of those only the shard's own range.

Each tensor's own bytes are read, converted matrix by matrix and copied into the shard's stacked matrices, so that
beside the result never more than one matrix's temporaries are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..kernels.protocol import ExpertMatrix, ExpertWeights, Kernels
from .checkpoint import Checkpoint
from .model.config import ModelConfig
from .model.expert_blocks import ExpertBlocks
from .model.expert_matrix import allocate_matrix, fill_matrix, read_matrix
from .model.layer_weights import AttentionWeights, LayerWeights, MlpWeights, MoeWeights, ShardWeights
from .model.tensors import check_tensors, expert_shapes, shard_tensors
from .precision import memory_format

Progress = Callable[[int, int], None]


def load_shard(
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: str,
    expert_range: range,
    kernels: Kernels,
    progress: Progress | None = None,
) -> ShardWeights:
    """Reads a shard's weights to the backend's device.

    precision: "auto" or a format that `precision.memory_format` allows. expert_range: the routed experts of every
    layer that this shard holds. progress: called with (bytes done, bytes total), first with 0 done.
    Raises CheckpointError (before anything is read for what the headers show: missing, misshaped or mistyped
    tensors), PrecisionError, or ValueError for an expert range outside the model's.
    """
    if expert_range.step != 1 or not 0 <= expert_range.start < expert_range.stop <= config.n_routed_experts:
        raise ValueError(f"experts {expert_range} are not a range within 0..{config.n_routed_experts}")
    disk = checkpoint.expert_format()
    memory = memory_format(disk, precision)
    total = check_tensors(checkpoint, shard_tensors(config, disk, expert_range))
    with _one_torch_thread():
        return _Loading(checkpoint, config, (disk, memory), expert_range, kernels.device, progress, total).shard()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
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
        formats: tuple[str, str],
        experts: range,
        device: torch.device,
        progress: Progress | None,
        total: int,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._disk, self._memory = formats
        self._experts = experts
        self._device = device
        self._progress = progress
        self._total = total
        self._before = checkpoint.bytes_read

    def shard(self) -> ShardWeights:
        self._report()
        embed, norm = self._read("model.embed_tokens.weight"), self._read("model.norm.weight")
        layers = tuple(self._layer(layer) for layer in range(self._config.num_hidden_layers))
        return ShardWeights(embed, self._read("lm_head.weight"), norm, layers, self._experts)

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
            q_a=self._read(f"{at}.q_a_proj.weight") if lora else None,
            q_norm=self._read(f"{at}.q_a_layernorm.weight") if lora else None,
            q_b=self._read(f"{at}.q_b_proj.weight" if lora else f"{at}.q_proj.weight"),
            kv_a=self._read(f"{at}.kv_a_proj_with_mqa.weight"),
            kv_norm=self._read(f"{at}.kv_a_layernorm.weight"),
            w_uk=up[:, : config.qk_nope_head_dim].transpose(1, 2).clone(memory_format=torch.contiguous_format),
            w_uv=up[:, config.qk_nope_head_dim :].clone(memory_format=torch.contiguous_format),
            output=self._read(f"{at}.o_proj.weight"),
        )

    def _mlp(self, at: str) -> MlpWeights:
        gate_up = torch.cat([self._read(f"{at}.gate_proj.weight"), self._read(f"{at}.up_proj.weight")])
        return MlpWeights(gate_up, self._read(f"{at}.down_proj.weight"))

    def _moe(self, layer: int) -> MoeWeights:
        at = f"model.layers.{layer}.mlp"
        return MoeWeights(
            gate=self._read(f"{at}.gate.weight"),
            gate_bias=self._read(f"{at}.gate.e_score_correction_bias").float(),
            shared=self._mlp(f"{at}.shared_experts"),
            experts=self._routed(f"{at}.experts"),
        )

    def _routed(self, at: str) -> ExpertBlocks:
        shapes, count = expert_shapes(self._config), len(self._experts)
        inner, hidden = shapes["gate_proj"]
        gate_up = allocate_matrix(self._memory, count, 2 * inner, hidden, self._device)
        down = allocate_matrix(self._memory, count, *shapes["down_proj"], self._device)
        for local, expert in enumerate(self._experts):
            self._matrix(gate_up, local, 0, f"{at}.{expert}.gate_proj")
            self._matrix(gate_up, local, inner, f"{at}.{expert}.up_proj")
            self._matrix(down, local, 0, f"{at}.{expert}.down_proj")
        held = ExpertWeights(self._experts.start, gate_up, down)
        return ExpertBlocks.of(self._experts.start, [(range(count), held)], self._device)

    def _matrix(self, target: ExpertMatrix, local: int, row: int, name: str) -> None:
        fill_matrix(target, local, row, read_matrix(self._checkpoint, name, self._disk, self._memory))
        self._report()

    def _read(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name).to(self._device)
        self._report()
        return tensor

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._checkpoint.bytes_read - self._before, self._total)
