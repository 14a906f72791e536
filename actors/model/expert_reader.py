"""Reads routed experts of one layer from a checkpoint into blocks, each of one kind of matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...kernels.cpu.converter import CpuConverter
from ...kernels.protocol import ExpertMatrix, ExpertWeights, Kernels, LayerExperts
from ..checkpoint import Checkpoint
from .config import ModelConfig
from .expert_blocks import ExpertBlocks
from .expert_matrix import MATRIX_KINDS, MatrixReader, allocate_matrix, matrix_rows
from .tensors import expert_shapes
from .weight_memory import WeightMemory


class ExpertReader:
    """Reads experts matrix by matrix, in the order of their numbers, into their place, and lays each block out.

    kernels: that will run them. memory: where they are read to. converter: of what must be converted. report: called
    after every matrix.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        kernels: Kernels,
        memory: WeightMemory,
        converter: CpuConverter,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        self._checkpoint, self._config, self._memory, self._report = checkpoint, config, memory, report
        self._kernels, self._matrices = kernels, MatrixReader(checkpoint, converter)

    def read(self, layer: int, experts: Sequence[int], memory: Sequence[str]) -> ExpertBlocks:
        """Experts of the layer, by slot; memory: the format in memory of each."""
        groups: dict[type[ExpertMatrix], list[int]] = {}
        for local, format in enumerate(memory):
            groups.setdefault(MATRIX_KINDS[format], []).append(local)
        blocks = [(members, self._allocate(memory[members[0]], len(members))) for members in groups.values()]
        place = {local: (weights, at) for members, weights in blocks for at, local in enumerate(members)}
        for local, format in enumerate(memory):
            self._fill(*place[local], layer, experts[local], format)
        place.clear()  # what is laid out anew is not to be held beside its copy
        prepared = [(members, self._kernels.prepare(blocks.pop(0)[1])) for members in groups.values()]
        return ExpertBlocks.of(prepared, self._memory.device)

    def block(self, layer: int, experts: Sequence[int], memory: Sequence[str]) -> LayerExperts:
        """Experts of the layer, by their numbers there, whose formats in memory are of one kind of matrix."""
        weights = self._allocate(memory[0], len(experts))
        for place, (expert, format) in enumerate(zip(experts, memory, strict=True)):
            self._fill(weights, place, layer, expert, format)
        return self._kernels.prepare(weights)

    def _allocate(self, format: str, count: int) -> ExpertWeights:
        shapes = expert_shapes(self._config)
        inner, hidden = shapes["gate_proj"]
        gate_up = allocate_matrix(format, count, 2 * inner, hidden, self._memory)
        return ExpertWeights(gate_up, allocate_matrix(format, count, *shapes["down_proj"], self._memory))

    def _fill(self, weights: ExpertWeights, place: int, layer: int, expert: int, format: str) -> None:
        disk, inner = self._checkpoint.matrix_format(layer, expert), self._config.moe_intermediate_size
        at, shapes = f"model.layers.{layer}.mlp.experts.{expert}", expert_shapes(self._config)
        for target, row, name in (
            (weights.gate_up, 0, "gate_proj"),
            (weights.gate_up, inner, "up_proj"),
            (weights.down, 0, "down_proj"),
        ):
            rows = matrix_rows(target, place, row, shapes[name][0])
            self._matrices.read(f"{at}.{name}", disk, format, rows)
            self._report()
