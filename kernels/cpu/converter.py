"""Stored weights to what the kernels multiply, written to their place while they are loaded, at the speed of memory."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..folding import CANDIDATES, REFITS, fold_rows
from ..formats import GROUP_SIZE, PACK, dequantize_native, unpack_native
from ..protocol import Int4Weight, Int8Weight
from ..weight_checks import check_fold, refuse_weight
from . import commands
from .handle import CpuHandle

_NATIVE, _FOLDED, _FLOATS = range(3)


class CpuConverter:
    """Every method fills `target`, whose tensors are contiguous and on the CPU, and raises ValueError, naming the row,
    for what is not finite or does not fit. threads and variant as `CpuHandle`, which is opened when there is something
    to convert. N rows, K columns."""

    def __init__(self, threads: int, variant: str = "") -> None:
        self._threads, self._variant = threads, variant

    @cached_property
    def _handle(self) -> CpuHandle:
        return CpuHandle(self._threads, self._variant)

    def native(self, packed: Tensor, scale: Tensor, target: Int4Weight | Int8Weight) -> None:
        """packed [N, K/8] int32 native nibbles, scale [N, K/32] bfloat16 or float32. INT4: the nibbles as they are with
        scales as `formats.fold_scales`; INT8: the dequantized weights as `formats.quantize_int8_rows`."""
        rows, groups = check_fold(packed, scale)
        bad = self._run(_NATIVE, packed, scale, scale.dtype, target, rows, groups * GROUP_SIZE)
        if bad < 0:
            return
        if isinstance(target, Int4Weight):
            energy = unpack_native(packed[bad : bad + 1]).unflatten(1, (-1, GROUP_SIZE)).float().square().sum(-1)
            fold_rows(energy, scale[bad : bad + 1].float(), bad)
        refuse_weight(dequantize_native(packed, scale, torch.float32), bad)

    def folded(self, packed: Tensor, multipliers: Tensor, target: Int4Weight) -> None:
        """packed as `native`, multipliers [N, K/64] uint8, two a byte; target.scale is the caller's to fill."""
        rows, columns = packed.shape[0], packed.shape[1] * PACK
        if multipliers.dtype is not torch.uint8 or list(multipliers.shape) != [rows, columns // (2 * GROUP_SIZE)]:
            found = f"{str(multipliers.dtype).removeprefix('torch.')} {list(multipliers.shape)}"
            raise ValueError(f"multipliers are {found}, expected uint8 [{rows}, {columns // (2 * GROUP_SIZE)}]")
        bad = self._run(_FOLDED, packed, multipliers, torch.bfloat16, target, rows, columns)
        if bad >= 0:
            raise ValueError(f"packed multipliers of row {bad} hold a 0; every multiplier lies in 1..15")

    def floats(self, weight: Tensor, target: Int4Weight | Int8Weight, first: int = 0) -> None:
        """weight [N, K] bfloat16 or float32. INT8 as `formats.quantize_int8_rows`, INT4 as `flyray quantize` makes w4a8
        of floats. first: the number of the first row in messages."""
        if weight.dtype not in (torch.bfloat16, torch.float32) or weight.dim() != 2 or not weight.shape[1]:
            found = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
            raise ValueError(f"weight is {found}, expected a bfloat16 or float32 matrix")
        rows, columns = weight.shape
        bad = self._run(_FLOATS, weight, None, weight.dtype, target, rows, columns)
        if bad >= 0:
            refuse_weight(weight, bad, first)

    def _run(
        self,
        kind: int,
        values: Tensor,
        groups: Tensor | None,
        dtype: torch.dtype,
        target: Int4Weight | Int8Weight,
        rows: int,
        columns: int,
    ) -> int:
        """The least row that is refused, or -1. dtype: of the floats there are."""
        out, multipliers, scale = _checked(target, rows, columns)
        values = values.contiguous()
        groups = None if groups is None else groups.contiguous()
        bad = torch.empty(1, dtype=torch.int64)
        self._handle.run(commands.convert(
            kind, values.data_ptr(), 0 if groups is None else groups.data_ptr(), int(dtype is torch.bfloat16),
            CANDIDATES.data_ptr(), len(CANDIDATES), REFITS,
            out.data_ptr(), 0 if multipliers is None else multipliers.data_ptr(), scale.data_ptr(), bad.data_ptr(),
            rows, columns,
        ))  # fmt: skip
        return int(bad)


def _checked(target: Int4Weight | Int8Weight, rows: int, columns: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Values, multipliers (INT4 alone) and scale of a target for [rows, columns]."""
    multipliers = None
    if isinstance(target, Int4Weight):
        if columns % GROUP_SIZE:
            raise ValueError(f"weight has {columns} columns, not a multiple of {GROUP_SIZE}")
        values, multipliers = target.nibbles, target.multipliers
        _expect("nibbles", values, torch.uint8, rows, columns // 2)
        _expect("multipliers", multipliers, torch.uint8, rows, columns // GROUP_SIZE)
    else:
        values = target.values
        _expect("values", values, torch.int8, rows, columns)
    _expect("scale", target.scale, torch.float32, rows)
    return values, multipliers, target.scale


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    fits = tensor.dtype is dtype and tuple(tensor.shape) == shape and tensor.device.type == "cpu"
    if not fits or not tensor.is_contiguous():
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
        wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)}, contiguous on the CPU"
        raise ValueError(f"target's {name} is {found}, expected {wanted}")
