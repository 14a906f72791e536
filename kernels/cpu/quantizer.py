"""Weight quantizing in C++: the reference's bits, at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..clipping import ClipTable
from ..folding import CANDIDATES, REFITS, refuse_group_scale
from ..ordered import LANES
from ..quantizer import Folded
from ..weight_checks import (
    GROUP_SIZE,
    check_fold,
    check_importance,
    check_scale,
    check_weight,
    largest_integer,
    refuse_weight,
)
from . import commands
from .handle import CpuHandle


class CpuQuantizer:
    """`WeightQuantizer` in C++. threads and variant as `CpuHandle`; weights that are not contiguous are copied."""

    name = "cpu"

    def __init__(self, threads: int, variant: str = "") -> None:
        self._handle = CpuHandle(threads, variant)
        self.threads, self.variant = threads, self._handle.variant

    def close(self) -> None:
        """Ends the thread pool; no operation may run then or later. Also done when the object goes."""
        self._handle.close()

    def fold(self, packed: Tensor, group_scale: Tensor) -> Folded:
        rows, groups = check_fold(packed, group_scale)
        packed, group_scale = packed.contiguous(), group_scale.contiguous()
        multipliers = torch.empty(rows, groups, dtype=torch.uint8)
        scale = torch.empty(rows, dtype=torch.float32)
        difference, norm = torch.empty(rows, dtype=torch.float64), torch.empty(rows, dtype=torch.float64)
        bad = torch.empty(1, dtype=torch.int64)
        self._handle.run(commands.fold(
            packed.data_ptr(), group_scale.data_ptr(), int(group_scale.dtype is torch.bfloat16),
            CANDIDATES.data_ptr(), len(CANDIDATES), REFITS,
            multipliers.data_ptr(), scale.data_ptr(), difference.data_ptr(), norm.data_ptr(), bad.data_ptr(),
            rows, groups,
        ))  # fmt: skip
        if int(bad) >= 0:
            row, group = divmod(int(bad), groups)
            refuse_group_scale(row, group, float(group_scale[row, group]))
        return Folded(multipliers, scale, difference, norm)

    def row_scales(self, weight: Tensor, bits: int, importance: Tensor | None, clip: bool) -> Tensor:
        rows, _ = check_weight(weight, groups=False)
        scale = torch.empty(rows, dtype=torch.float32)
        return self._scales(weight, importance, largest_integer(bits), clip, scale, groups=False)

    def group_scales(self, weight: Tensor, importance: Tensor | None, clip: bool) -> Tensor:
        rows, columns = check_weight(weight, groups=True)
        scale = torch.empty(rows, columns // GROUP_SIZE, dtype=torch.float32)
        return self._scales(weight, importance, largest_integer(4), clip, scale, groups=True)

    def round_rows(self, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        rows, columns = check_weight(weight, groups=False)
        limit = largest_integer(bits)
        check_scale(scale, (rows,))
        return self._round(weight, scale, columns, -8 if bits == 4 else -limit, limit)

    def round_groups(self, weight: Tensor, scale: Tensor) -> Tensor:
        rows, columns = check_weight(weight, groups=True)
        check_scale(scale, (rows, columns // GROUP_SIZE))
        return self._round(weight, scale, GROUP_SIZE, -8, 7)

    def _scales(
        self, weight: Tensor, importance: Tensor | None, limit: int, clip: bool, scale: Tensor, groups: bool
    ) -> Tensor:
        rows, columns = weight.shape
        importance = check_importance(importance, columns)
        if importance is not None:
            importance = pad(importance, (0, -columns % LANES)).contiguous()
        weight, table, bad = weight.contiguous(), ClipTable.of(limit), torch.empty(1, dtype=torch.int64)
        command = commands.group_scales if groups else commands.row_scales
        self._handle.run(command(
            weight.data_ptr(), 0 if importance is None else importance.data_ptr(),
            table.clips.data_ptr(), table.steps.data_ptr(), table.squares.data_ptr(), len(table.clips) if clip else 0,
            float(limit), scale.data_ptr(), bad.data_ptr(), rows, columns,
        ))  # fmt: skip
        if int(bad) >= 0:
            refuse_weight(weight, int(bad))
        return scale

    def _round(self, weight: Tensor, scale: Tensor, group: int, low: int, high: int) -> Tensor:
        rows, columns = weight.shape
        weight, scale = weight.contiguous(), scale.contiguous()
        values, bad = torch.empty(rows, columns, dtype=torch.int8), torch.empty(1, dtype=torch.int64)
        self._handle.run(commands.round_weights(
            weight.data_ptr(), scale.data_ptr(), values.data_ptr(), bad.data_ptr(), rows, columns, group,
            float(low), float(high),
        ))  # fmt: skip
        if int(bad) >= 0:
            refuse_weight(weight, int(bad))
        return values
