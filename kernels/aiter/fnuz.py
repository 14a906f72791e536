"""FP8 of checkpoints (float8_e4m3fn) as gfx942 multiplies it (float8_e4m3fnuz).

The exponent's bias is 8 instead of 7, so the same bits are half the value; there is no negative zero, and the code that
would be it, 0x80, is the only NaN, while 0x7F and 0xFF are the numbers 240 and -240.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SIGN, _NAN = 0x80, 0x7F


def to_fnuz(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """values float8_e4m3fn, scale float32 -> values float8_e4m3fnuz and scale whose products are the same numbers.

    Exact for every code: bits stay, the scale doubles, -0 becomes 0 and either NaN the one NaN."""
    if values.dtype != torch.float8_e4m3fn:
        raise ValueError(f"values are {values.dtype}, expected torch.float8_e4m3fn")
    codes = values.view(torch.uint8)
    codes = codes.masked_fill(codes == _SIGN, 0).masked_fill_((codes & _NAN) == _NAN, _SIGN)
    return codes.view(torch.float8_e4m3fnuz), scale * 2


__all__ = ["to_fnuz"]
