"""The oracle of weight quantizing: every operation in plain PyTorch, float32 where its tensors are, slow and easy to
read."""

from __future__ import annotations

import torch
from torch import Tensor

from .clipping import search_scales
from .folding import fold_errors, fold_rows
from .formats import unpack_native
from .quantizer import Folded
from .weight_checks import (
    GROUP_SIZE,
    check_fold,
    check_importance,
    check_scale,
    check_weight,
    largest_integer,
    refuse_weight,
)

_ELEMENTS_A_CHUNK = 1 << 20  # bounds temporaries


class ReferenceQuantizer:
    """`WeightQuantizer` in plain PyTorch. Runs on torch's own intra-op threads, or where its tensors are; results do
    not depend on that."""

    name = "reference"

    def fold(self, packed: Tensor, group_scale: Tensor) -> Folded:
        rows, groups = check_fold(packed, group_scale, anywhere=True)
        device = packed.device
        multipliers = torch.empty(rows, groups, dtype=torch.uint8, device=device)
        scale = torch.empty(rows, dtype=torch.float32, device=device)
        difference, norm = (torch.empty(rows, dtype=torch.float64, device=device) for _ in range(2))
        for chunk in _chunks(rows, groups * GROUP_SIZE):
            values = unpack_native(packed[chunk]).unflatten(1, (groups, GROUP_SIZE)).float()
            energy, wanted = values.square().sum(-1), group_scale[chunk].float()
            multipliers[chunk], scale[chunk] = fold_rows(energy, wanted, chunk.start)
            difference[chunk], norm[chunk] = fold_errors(energy, wanted, multipliers[chunk], scale[chunk])
        return Folded(multipliers, scale, difference, norm)

    def row_scales(self, weight: Tensor, bits: int, importance: Tensor | None, clip: bool) -> Tensor:
        rows, columns = check_weight(weight, groups=False, anywhere=True)
        importance, limit = check_importance(importance, columns), largest_integer(bits)
        _check_finite(weight)
        scale = torch.empty(rows, dtype=torch.float32, device=weight.device)
        shared = None if importance is None else importance.unsqueeze(0)
        for chunk in _chunks(rows, columns):
            scale[chunk] = _scales(weight[chunk], shared, limit, clip)
        return scale

    def group_scales(self, weight: Tensor, importance: Tensor | None, clip: bool) -> Tensor:
        rows, columns = check_weight(weight, groups=True, anywhere=True)
        importance, limit = check_importance(importance, columns), largest_integer(4)
        _check_finite(weight)
        groups = columns // GROUP_SIZE
        scale = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
        for chunk in _chunks(rows, columns):
            part = weight[chunk]
            shared = None if importance is None else importance.view(groups, GROUP_SIZE).repeat(len(part), 1)
            scale[chunk] = _scales(part.reshape(-1, GROUP_SIZE), shared, limit, clip).view(-1, groups)
        return scale

    def round_rows(self, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        rows, _ = check_weight(weight, groups=False, anywhere=True)
        limit = largest_integer(bits)
        check_scale(scale, (rows,), anywhere=True)
        _check_finite(weight)
        return _round(weight, scale.unsqueeze(1), -8 if bits == 4 else -limit, limit)

    def round_groups(self, weight: Tensor, scale: Tensor) -> Tensor:
        rows, columns = check_weight(weight, groups=True, anywhere=True)
        check_scale(scale, (rows, columns // GROUP_SIZE), anywhere=True)
        _check_finite(weight)
        return _round(weight.unflatten(1, (-1, GROUP_SIZE)), scale.unsqueeze(2), -8, 7).flatten(1)


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _ELEMENTS_A_CHUNK // max(1, columns))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _scales(weight: Tensor, importance: Tensor | None, limit: int, clip: bool) -> Tensor:
    if clip:
        return search_scales(weight, importance, limit)
    largest = weight.abs().amax(1)
    return largest / torch.full_like(largest, limit)


def _round(weight: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    used = scale > 0
    ratio = weight / torch.where(used, scale, torch.ones_like(scale))
    return torch.where(used, ratio.clamp_(low, high).round_(), torch.zeros_like(ratio)).to(torch.int8)


def _check_finite(weight: Tensor) -> None:
    bad = ~weight.isfinite().all(1)
    if bool(bad.any()):
        refuse_weight(weight, int(bad.nonzero()[0]))
