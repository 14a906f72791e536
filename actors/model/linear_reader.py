"""Reads the linears beside the routed experts from a checkpoint, as they are or rounded to INT8 or INT4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor

from ...kernels.cpu.converter import CpuConverter
from ...kernels.formats import GROUP_SIZE
from ...kernels.protocol import LinearWeight
from ..checkpoint import Checkpoint, CheckpointError
from .expert_matrix import Parts, integer_weight, on_cpu, read_int8
from .weight_memory import WeightMemory


class LinearReader:
    """memory: where they will lie. threads: what rounding may use. report: called after every tensor."""

    def __init__(
        self, checkpoint: Checkpoint, memory: WeightMemory, threads: int, report: Callable[[], None] = lambda: None
    ) -> None:
        self._checkpoint, self._memory, self._threads, self._report = checkpoint, memory, threads, report

    def read(self, names: Sequence[str], bits: int) -> LinearWeight:
        """The rows of all these linears as one weight. bits: 16 as they are, in the wider dtype where they differ; 8 or
        4: floats become an Int8Weight or Int4Weight. Linears that are INT8 on disk stay so, and then all are.

        Raises CheckpointError naming the tensor for values that are not finite or columns that are not whole groups.
        """
        if names[0] in self._checkpoint.formats.int8_linears:
            bits = 8
        entries = [self._checkpoint.entry(f"{name}.weight") for name in names]
        rows, columns = sum(entry.shape[0] for entry in entries), entries[0].shape[1]
        if bits == 16:
            dtype = reduce(torch.promote_types, (entry.dtype for entry in entries))
            weight = self._memory.empty(dtype, rows, columns)
            self._fill(names, (weight,))
            return weight
        parts = self._parts(rows, columns, bits)
        self._fill(names, parts)
        return integer_weight(parts)

    @cached_property
    def _converter(self) -> CpuConverter:
        return CpuConverter(self._threads)

    def _parts(self, rows: int, columns: int, bits: int) -> Parts:
        empty = self._memory.empty
        if bits == 8:
            return empty(torch.int8, rows, columns), empty(torch.float32, rows)
        nibbles, multipliers = empty(torch.uint8, rows, columns // 2), empty(torch.uint8, rows, columns // GROUP_SIZE)
        return nibbles, multipliers, empty(torch.float32, rows)

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
