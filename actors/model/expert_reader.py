"""Reads routed experts of one layer from a checkpoint into blocks, each of one kind of matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...kernels.protocol import ExpertMatrix, ExpertWeights
from ..checkpoint import Checkpoint
from .config import ModelConfig
from .expert_blocks import ExpertBlocks
from .expert_matrix import MATRIX_KINDS, MatrixReader, allocate_matrix, fill_matrix
from .tensors import expert_shapes


class ExpertReader:
    """Reads experts matrix by matrix, so that beside the result one matrix's temporaries are alive.

    threads: what quantizing may use. report: called after every matrix.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        device: torch.device,
        threads: int,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        self._checkpoint, self._config, self._device, self._report = checkpoint, config, device, report
        self._matrices = MatrixReader(checkpoint, threads, device)

    def read(self, layer: int, experts: range, memory: Sequence[str]) -> ExpertBlocks:
        """The layer's experts; memory: the format in memory of each."""
        groups: dict[type[ExpertMatrix], list[int]] = {}
        for local, format in enumerate(memory):
            groups.setdefault(MATRIX_KINDS[format], []).append(local)
        blocks = []
        for members in groups.values():
            numbers = [experts[local] for local in members]
            blocks.append((members, self.block(layer, numbers, [memory[local] for local in members])))
        return ExpertBlocks.of(blocks, self._device)

    def block(self, layer: int, experts: Sequence[int], memory: Sequence[str]) -> ExpertWeights:
        """Experts of the layer, by their numbers there, whose formats in memory are of one kind of matrix."""
        shapes, count = expert_shapes(self._config), len(experts)
        inner, hidden = shapes["gate_proj"]
        gate_up = allocate_matrix(memory[0], count, 2 * inner, hidden, self._device)
        down = allocate_matrix(memory[0], count, *shapes["down_proj"], self._device)
        for place, (expert, format) in enumerate(zip(experts, memory, strict=True)):
            disk = self._checkpoint.matrix_format(layer, expert)
            at = f"model.layers.{layer}.mlp.experts.{expert}"
            for target, row, name in ((gate_up, 0, "gate_proj"), (gate_up, inner, "up_proj"), (down, 0, "down_proj")):
                fill_matrix(target, place, row, self._matrices.read(f"{at}.{name}", disk, format))
                self._report()
        return ExpertWeights(gate_up, down)
