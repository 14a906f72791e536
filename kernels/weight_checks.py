"""Argument checks that every weight quantizer shares, by argument, row and group or column."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

GROUP_SIZE = 32
_PACKED_GROUP = GROUP_SIZE // 8
_LIMITS = {4: 7, 8: 127}


def largest_integer(bits: int) -> int:
    """limit of the integers -limit..limit."""
    if bits not in _LIMITS:
        raise ValueError(f"bits is {bits}, expected {' or '.join(map(str, _LIMITS))}")
    return _LIMITS[bits]


def check_fold(packed: Tensor, group_scale: Tensor, anywhere: bool = False) -> tuple[int, int]:
    """N and G. anywhere: on any device, not on the CPU alone; so below."""
    _expect("packed", packed, (torch.int32,), 2, anywhere)
    rows, words = packed.shape
    if words == 0 or words % _PACKED_GROUP:
        raise ValueError(f"packed has {words} columns of 8 values, expected whole groups of {GROUP_SIZE} values")
    _expect("group_scale", group_scale, (torch.bfloat16, torch.float32), 2, anywhere)
    _expect_shape("group_scale", group_scale, (rows, words // _PACKED_GROUP))
    return rows, words // _PACKED_GROUP


def check_weight(weight: Tensor, groups: bool, anywhere: bool = False) -> tuple[int, int]:
    """N and K, K in whole groups where `groups`. Values are not looked at."""
    _expect("weight", weight, (torch.float32,), 2, anywhere)
    rows, columns = weight.shape
    if columns == 0:
        raise ValueError(f"weight has no columns: {list(weight.shape)}")
    if groups and columns % GROUP_SIZE:
        raise ValueError(f"weight has {columns} columns, not a multiple of {GROUP_SIZE}")
    return rows, columns


def check_scale(scale: Tensor, shape: tuple[int, ...], anywhere: bool = False) -> None:
    """Finite and not negative."""
    _expect("scale", scale, (torch.float32,), len(shape), anywhere)
    _expect_shape("scale", scale, shape)
    bad = ~(scale.isfinite() & (scale >= 0))
    if bool(bad.any()):
        place = [int(i) for i in bad.nonzero()[0]]
        where = ", ".join(f"{name} {i}" for name, i in zip(("row", "group"), place, strict=False))
        raise ValueError(f"scale of {where} is {float(scale[tuple(place)])}; expected a finite number, 0 or more")


def check_importance(importance: Tensor | None, columns: int) -> Tensor | None:
    """The importance divided by its largest, so that sums of squares do not overflow; errors only scale with it."""
    if importance is None:
        return None
    _expect("importance", importance, (torch.float32,), 1)
    _expect_shape("importance", importance, (columns,))
    bad = ~(importance.isfinite() & (importance >= 0))
    if bool(bad.any()):
        column = int(bad.nonzero()[0])
        raise ValueError(f"importance of column {column} is {float(importance[column])}; expected 0 or more, finite")
    largest = float(importance.max())
    return importance / largest if largest > 0 else importance


def refuse_weight(weight: Tensor, row: int, first: int = 0) -> NoReturn:
    """Raises the ValueError for the first value of that row that is not finite. first: what row 0 is called."""
    column = int((~weight[row].isfinite()).nonzero()[0])
    found = float(weight[row, column])
    raise ValueError(f"weight of row {first + row}, column {column} is {found}; expected a finite number")


def _expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], dims: int, anywhere: bool = False) -> None:
    if tensor.dtype not in dtypes or tensor.dim() != dims or not (anywhere or tensor.device.type == "cpu"):
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(
            f"{name} is {found}, expected {wanted} with {dims} dimensions{'' if anywhere else ' on the CPU'}"
        )


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
