"""How far rounded weights are from their source, measured a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from .matrix import QuantizeError, dequantize

# Weights compared at a time: their float64 copies stay in cache, which is five times as fast as a whole matrix.
_WEIGHTS = 1 << 19


def squared_error(
    source_format: str, source: Mapping[str, Tensor], format: str, made: Mapping[str, Tensor], rows: int, columns: int
) -> tuple[float, float]:
    """Squared Frobenius norms of the difference and of the source, whose tensors are those of one matrix in either
    format. Raises QuantizeError if what was made is not finite."""
    difference = norm = 0.0
    step = max(1, _WEIGHTS // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        want = dequantize(source_format, _rows(source, part, rows)).double()
        got = dequantize(format, _rows(made, part, rows)).double()
        difference += float((got - want).square_().sum())
        norm += float(want.square_().sum())
    if not math.isfinite(difference):
        raise QuantizeError(f"{format} gives weights that are not finite")
    return difference, norm


def _rows(parts: Mapping[str, Tensor], rows: slice, count: int) -> dict[str, Tensor]:
    """The rows of every tensor that has one entry or more a row; others (a scale of the whole matrix) as they are."""
    return {part: tensor[rows] if tensor.shape[:1] == (count,) else tensor for part, tensor in parts.items()}
