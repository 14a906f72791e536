"""What turning weights into integers needs from a backend: scales by search, rounding, and folding group scales.

Every backend gives the same bits, so that a quantized checkpoint does not depend on the machine that made it. Sums
run in the order of `kernels.ordered`. N rows, K columns, G = K / 32 groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Folded:
    """Group scales as integers: weight = value * multiplier * scale.

    multipliers: [N, G] uint8 in 1..15. scale: [N] float32, 0 for a row of zeros. difference, norm: [N] float64, a
    row's squared error against value * group_scale, and its squared norm.
    """

    multipliers: Tensor
    scale: Tensor
    difference: Tensor
    norm: Tensor


class WeightQuantizer(Protocol):
    """One backend. Refuses with a ValueError, naming row and group or column, what is not finite or does not fit."""

    name: str

    def fold(self, packed: Tensor, group_scale: Tensor) -> Folded:
        """packed [N, K/8] int32 native nibbles, group_scale [N, G] bfloat16 or float32; as `formats.fold_scales`."""
        ...

    def row_scales(self, weight: Tensor, bits: int, importance: Tensor | None, clip: bool) -> Tensor:
        """weight [N, K] float32, bits 4 or 8, importance [K] float32 of a column's error or None for all alike ->
        scale [N] float32 for integers of -limit..limit, limit 2^(bits-1) - 1: absmax / limit, or with `clip` the
        candidate with the least sum of importance * (weight - rounded * scale)^2."""
        ...

    def group_scales(self, weight: Tensor, importance: Tensor | None, clip: bool) -> Tensor:
        """weight [N, K] float32 -> scale [N, G] float32 for INT4 of -7..7 in groups of 32 columns, as `row_scales`."""
        ...

    def round_rows(self, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        """weight [N, K] float32, scale [N] float32 -> [N, K] int8, half to even, -limit - 1..limit for 4 bits and
        -limit..limit for 8; 0 where the scale is 0."""
        ...

    def round_groups(self, weight: Tensor, scale: Tensor) -> Tensor:
        """weight [N, K] float32, scale [N, G] float32 -> [N, K] int8 in -8..7, half to even; 0 where the scale is 0."""
        ...
