"""The search for the scale of a row or group of weights that loses least: the reference of every backend.

A candidate is absmax * clip / limit for each clip of a fixed table; what lies beyond is cut to the largest integer.
Its error is sum of importance * (weight - integer * scale)^2. With a = |weight| / absmax it is proportional to

    clip^2 * sum of importance * (a * step - min(a * step, limit) rounded)^2,    step = limit / clip,

which has the same numbers for weights of any magnitude. All of it is float32 in the order of `ordered`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ordered import ordered_sum

# 1.00, 0.98, … 0.06. 1.0 first: where nothing is better, or errors are equal, nothing is clipped. INT8 rows and INT4
# groups end above 0.8, where small steps pay; Gaussian INT4 rows at 0.63, rows with heavy tails (Student-t3) below 0.2.
CLIPS = torch.linspace(1.0, 0.06, 48, dtype=torch.float32)
TINY = 2.0**-100
"""Rows below it are multiplied with its inverse first, so that 1 / absmax is no infinity."""


@dataclass(frozen=True)
class ClipTable:
    """Candidates for integers of -limit..limit, all [C] float32: clips, steps = limit / clips, squares = clips^2."""

    clips: Tensor
    steps: Tensor
    squares: Tensor

    @staticmethod
    def of(limit: int) -> ClipTable:
        return ClipTable(CLIPS, torch.full_like(CLIPS, limit) / CLIPS, CLIPS * CLIPS)


def clip_errors(weight: Tensor, importance: Tensor | None, limit: int) -> Tensor:
    """weight [N, K] float32, importance [N, K] or [1, K] float32 or None -> [C, N] float32, each candidate's error in
    units of (absmax / limit)^2."""
    table, a = ClipTable.of(limit), _relative(weight)
    errors = torch.empty(len(table.clips), weight.shape[0], dtype=torch.float32, device=weight.device)
    for candidate, (step, square) in enumerate(zip(table.steps.tolist(), table.squares.tolist(), strict=True)):
        wanted = a * step
        difference = wanted - wanted.clamp(max=limit).round_()
        squared = difference * difference
        errors[candidate] = ordered_sum(squared if importance is None else squared * importance) * square
    return errors


def search_scales(weight: Tensor, importance: Tensor | None, limit: int) -> Tensor:
    """weight [N, K] float32, importance as `clip_errors` -> scale of each row [N] float32; ties to less clipping."""
    # torch's argmin does not promise the first of equal values; a stable sort does.
    best = clip_errors(weight, importance, limit).sort(dim=0, stable=True).indices[0]
    clipped = weight.abs().amax(1) * CLIPS.to(weight.device)[best]
    return clipped / torch.full_like(clipped, limit)


def _relative(weight: Tensor) -> Tensor:
    """|weight| in units of its row's largest, 0 in a row of zeros."""
    largest = weight.abs().amax(1, keepdim=True)
    lift = torch.where(largest < TINY, 1 / TINY, 1.0)
    inverse = torch.where(largest > 0, torch.ones_like(largest) / (largest * lift), torch.zeros_like(largest))
    return weight.abs() * lift * inverse
