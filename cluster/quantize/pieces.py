"""A file's work in pieces that each fit a worker's memory, in the order in which their results are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .memory import COPY_CHUNK, MemoryBudget
from .plan import CopyPlan, Item, MatrixPlan
from .quark_quantizer import quark_bytes


@dataclass(frozen=True)
class CopyPiece:
    """Bytes low..high of a tensor whose values stay as they are."""

    copy: CopyPlan
    low: int
    high: int


@dataclass(frozen=True)
class RowsPiece:
    """Rows low..high of a matrix: to be rounded, or, by Quark, to be written."""

    matrix: MatrixPlan
    low: int
    high: int

    @property
    def last(self) -> bool:
        return self.high == self.matrix.rows

    @property
    def whole(self) -> bool:
        return self.last and self.low == 0

    @property
    def source_bytes(self) -> int:
        return self.matrix.source_bytes * (self.high - self.low) // self.matrix.rows


@dataclass(frozen=True)
class QuarkPiece:
    """Rows that Quark rounds together, before any of them is written; of several formats, a call each."""

    rows: tuple[RowsPiece, ...]


Piece = CopyPiece | RowsPiece | QuarkPiece


def cut(items: Sequence[Item], budget: MemoryBudget, smoothing: bool = False) -> Iterator[Piece]:
    """smoothing: copied tensors may be multiplied, so each comes whole."""
    batch: list[Item] = []
    taken = largest = 0
    for item in items:
        more, alone = _quark_needs(item, budget)
        if taken and more and taken + more + max(largest, alone) > budget.limit:
            yield from _batch(batch, budget, smoothing)
            batch, taken, largest = [], 0, 0
        batch.append(item)
        taken, largest = taken + more, max(largest, alone)
    yield from _batch(batch, budget, smoothing)


def _quark_needs(item: Item, budget: MemoryBudget) -> tuple[int, int]:
    """Bytes that a matrix adds to a call of Quark, and those that the call needs for it alone; 0 for other items."""
    if isinstance(item, CopyPlan) or item.scheme.by != "quark":
        return 0, 0
    size = (item.rows, item.columns)
    alone = quark_bytes(item.scheme.format, [size])
    return item.source_bytes + quark_bytes(item.scheme.format, [size, size]) - alone, alone


def _batch(items: Sequence[Item], budget: MemoryBudget, smoothing: bool) -> Iterator[Piece]:
    quark = [item for item in items if isinstance(item, MatrixPlan) and item.scheme.by == "quark"]
    together = [matrix for matrix in quark if budget.rows(matrix) == matrix.rows]
    if together:
        yield QuarkPiece(tuple(RowsPiece(matrix, 0, matrix.rows) for matrix in together))
    for item in items:
        if isinstance(item, CopyPlan):
            step = max(1, item.entry.bytes) if smoothing else COPY_CHUNK
            for low in range(0, item.entry.bytes, step):
                yield CopyPiece(item, low, min(low + step, item.entry.bytes))
            continue
        step = budget.rows(item)
        for low in range(0, item.rows, step):
            rows = RowsPiece(item, low, min(low + step, item.rows))
            if item.scheme.by == "quark" and not rows.whole:
                yield QuarkPiece((rows,))
            yield rows
