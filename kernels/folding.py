"""The search that writes group scales as integer multipliers times one scale a row: the reference of every backend.

The error minimized is sum over groups of energy * (multiplier * scale - group_scale)^2, with the sum of a group's
squared INT4 values as its energy. For a row scale the best multipliers are the nearest integers, and for multipliers
the best scale is a weighted mean in closed form. Every candidate row scale is tried, and the best one is refitted:
neither half of a refit can raise the error. All of it is float32 in the order of `ordered`, relative to the row's
largest scale, so that squares of very small scales do not vanish.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .ordered import ordered_sum

MAX_MULTIPLIER = 15
"""Fits four bits, and 15 * 8 = 120 fits int8."""

# Row scales tried: the largest group scale divided by 4 .. 28. Above 15.5 the largest groups are clipped to multiplier
# 15, which pays when they are few (heavy tails); below, rounding has fewer steps but may hit an exact ratio. On
# Gaussian, Laplace and Student-t5 rows of K = 64 .. 7168 this stays within 1.01 of the exact optimum's error.
CANDIDATES = torch.linspace(4, 28, 48, dtype=torch.float32)
REFITS = 3


def fold_rows(energy: Tensor, group_scale: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """energy and group_scale [N, G] float32 -> multipliers [N, G] uint8, scale [N] float32.

    A group without energy gets multiplier 1. Raises the ValueError of `refuse_group_scale`; `first_row` is the row
    number of the first row in it."""
    used = energy > 0
    bad = ~group_scale.isfinite() | (used & (group_scale <= 0))
    if bool(bad.any()):
        row, group = (int(i) for i in bad.nonzero()[0])
        refuse_group_scale(first_row + row, group, float(group_scale[row, group]))
    largest = torch.where(used, group_scale, torch.zeros_like(group_scale)).amax(1)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    target = torch.where(used, group_scale / unit.unsqueeze(1), torch.zeros_like(group_scale))
    weighted = energy * target
    best_gain = torch.zeros_like(largest)
    scale = torch.ones_like(largest)
    for candidate in CANDIDATES.tolist():
        cross, square = _moments(_nearest(target * candidate), weighted, energy)
        gain = cross * cross / square  # what these multipliers, with their best scale, take off the squared error
        better = gain > best_gain  # false for a row of zeros, where it is 0 / 0
        best_gain = torch.where(better, gain, best_gain)
        scale = torch.where(better, cross / square, scale)
    multipliers = target
    for _ in range(REFITS):
        multipliers = _nearest(target / scale.unsqueeze(1))
        cross, square = _moments(multipliers, weighted, energy)
        scale = torch.where(square > 0, cross / square, scale)
    return torch.where(used, multipliers, 1.0).to(torch.uint8), scale * largest


def fold_errors(energy: Tensor, group_scale: Tensor, multipliers: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """energy, group_scale and multipliers [N, G], scale [N] -> a row's squared error against value * group_scale and
    its squared norm, both [N] float64: sums over groups in the order of `ordered`, but in float64."""
    energy, wanted = energy.double(), group_scale.double()
    difference = multipliers.double() * scale.double().unsqueeze(1) - wanted
    return ordered_sum(energy * (difference * difference)), ordered_sum(energy * (wanted * wanted))


def refuse_group_scale(row: int, group: int, value: float) -> NoReturn:
    """Raises the ValueError for a group scale that no positive multiplier can express without changing nibbles."""
    raise ValueError(
        f"group scale of row {row}, group {group} is {value}; "
        "folding needs finite scales, positive where the group has values other than 0"
    )


def _nearest(ratio: Tensor) -> Tensor:
    """Group scales as multiples of the row scale, [N, G] float32 -> the nearest integers in 1..15, float32."""
    return ratio.clamp(1, MAX_MULTIPLIER).round_()


def _moments(multipliers: Tensor, weighted: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    return ordered_sum(weighted * multipliers), ordered_sum(energy * multipliers * multipliers)
