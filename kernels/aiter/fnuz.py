"""FP8 of checkpoints (float8_e4m3fn) as gfx942 multiplies it (float8_e4m3fnuz).

The exponent's bias is 8 instead of 7, so the same bits are half the value; there is no negative zero, and the code that
would be it, 0x80, is the only NaN, while 0x7F and 0xFF are the numbers 240 and -240.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SIGN, _NAN = 0x80, 0x7F


def fnuz_values(values: Tensor) -> Tensor:
    """float8_e4m3fn -> float8_e4m3fnuz of half the value: the same bits, but 0 for -0 and the one NaN for either.

    With `fnuz_scale` of their scale they are the same numbers, exactly, for every code."""
    if values.dtype != torch.float8_e4m3fn:
        raise ValueError(f"values are {values.dtype}, expected torch.float8_e4m3fn")
    codes = values.view(torch.uint8)
    codes = codes.masked_fill(codes == _SIGN, 0).masked_fill_((codes & _NAN) == _NAN, _SIGN)
    return codes.view(torch.float8_e4m3fnuz)


def fnuz_scale(scale: Tensor) -> Tensor:
    """Of values that `fnuz_values` has halved."""
    return scale * 2


__all__ = ["fnuz_scale", "fnuz_values"]
