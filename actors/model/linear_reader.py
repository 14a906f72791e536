"""Reads the linears beside the routed experts from a checkpoint, as they are or rounded to INT8 or INT4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from ...kernels.cpu.converter import CpuConverter
from ...kernels.protocol import LinearWeight
from ..checkpoint import Checkpoint, CheckpointError
from .expert_matrix import Parts, allocate_matrix, integer_weight, matrix_rows, on_cpu, read_int8
from .weight_memory import WeightMemory

# The memory formats that experts of as many bits have: their matrices are laid out alike.
_FORMATS = {8: "w8a8", 4: "w4a8"}


class LinearReader:
    """memory: where they will lie. converter: of what is rounded. report: called after every tensor."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        memory: WeightMemory,
        converter: CpuConverter,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        self._checkpoint, self._memory, self._converter, self._report = checkpoint, memory, converter, report

    def read(self, names: Sequence[str], bits: int) -> LinearWeight:
        """The rows of all these linears as one weight. bits: 16 as they are, in the wider dtype where they differ; 8 or
        4: floats become an Int8Weight or Int4Weight. Linears that are INT8 on disk stay so, and then all are.

        Raises CheckpointError naming the tensor for values that are not finite or columns that are not whole groups.
        """
        if not self._checkpoint.formats.int8_linears.isdisjoint(names):
            bits = 8
        entries = [self._checkpoint.entry(f"{name}.weight") for name in names]
        rows, columns = sum(entry.shape[0] for entry in entries), entries[0].shape[1]
        if bits == 16:
            dtype = reduce(torch.promote_types, (entry.dtype for entry in entries))
            weight = self._memory.empty(dtype, rows, columns)
            self._fill(names, (weight,))
            return weight
        matrix = allocate_matrix(_FORMATS[bits], 1, rows, columns, self._memory)
        parts = matrix_rows(matrix, 0, 0, rows)
        self._fill(names, parts)
        return integer_weight(parts)

    def _fill(self, names: Sequence[str], target: Parts) -> None:
        row = 0
        for name in names:
            if name in self._checkpoint.formats.int8_linears:
                values, scale = read_int8(self._checkpoint, name)
                self._copy(target, row, (values, scale))
                row += len(values)
            else:
                row = self._fill_floats(name, target, row)
            self._report()

    def _fill_floats(self, name: str, target: Parts, row: int) -> int:
        first = row
        for piece in self._checkpoint.pieces(f"{name}.weight"):
            if len(target) == 1:
                self._copy(target, row, (piece,))
            else:
                self._round(name, piece, tuple(part[row : row + len(piece)] for part in target), row - first)
            row += len(piece)
        return row

    def _round(self, name: str, piece: Tensor, target: Parts, first: int) -> None:
        """first: the piece's first row in its tensor."""
        try:
            on_cpu(target, lambda parts: self._converter.floats(piece, integer_weight(parts), first))
        except ValueError as error:
            raise CheckpointError(f"{self._checkpoint.path}: {name}.weight: {error}") from error

    @staticmethod
    def _copy(target: Parts, row: int, source: Parts) -> None:
        for part, stored in zip(target, source, strict=True):
            part[row : row + len(stored)].copy_(stored)
