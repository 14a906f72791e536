"""float32 arithmetic whose every rounding is defined, so that backends can agree to the bit.

**Sums** run in 16 lanes: lane i adds elements i, i + 16, i + 32, … in that order, starting at zero and with a missing
tail counted as zeros; the lanes are then folded 8 + 8, 4 + 4, 2 + 2, 1 + 1. Products are rounded before they are
added (no fused multiply-add). That is one 512-bit register, two of 256 or four of 128 bits, with the same bits.

**exp** uses only IEEE additions, multiplications and bit shifts: x is clamped to [-87, 88], n = round(x * log2 e),
r = (x - n * LN2_HIGH) - n * LN2_LOW, a polynomial of degree 7 in r by Horner's rule (coefficients of Cephes' `expf`),
scaled by 2^n through the exponent bits. Maximum error 1.0e-7 relative (under 2 units in the last place) within the
clamp. Below -87 it stays at 1.6e-38, above 88 at 1.7e38, so it never returns 0, infinity or a subnormal; NaN stays NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 16
EXP_MIN, EXP_MAX = -87.0, 88.0
LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
# 1.5 * 2^23: adding it rounds a small float to an integer (half to even) and leaves that integer in the low bits.
ROUND_MAGIC = 12582912.0
ROUND_MAGIC_BITS = 0x4B400000
EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_CHUNK_ELEMENTS = 1 << 22


def ordered_exp(x: Tensor) -> Tensor:
    """exp of float32 values by the module's definition, same shape."""
    x = x.clamp(EXP_MIN, EXP_MAX)
    shifted = x * LOG2_E + ROUND_MAGIC
    n = shifted - ROUND_MAGIC
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    y = torch.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        y = y * r
        y = y + coefficient
    y = y * r
    y = y * r
    y = y + r
    y = y + 1.0
    power = ((shifted.view(torch.int32) - ROUND_MAGIC_BITS + 127) << 23).view(torch.float32)
    return y * power


def ordered_sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), float32, same shape."""
    return torch.ones_like(x) / (ordered_exp(-x) + 1.0)


def ordered_silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), float32, same shape."""
    return x / (ordered_exp(-x) + 1.0)


def fold_lanes(lanes: Tensor) -> Tensor:
    """[..., 16] -> [...] of the same dtype, by halves."""
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width:]
    return lanes[..., 0]


def ordered_sum(x: Tensor) -> Tensor:
    """[T, K] float32 or float64 -> [T] of the same dtype."""
    lanes = x.new_zeros(x.shape[0], LANES)
    for block in _blocks(x).unbind(0):
        lanes += block
    return fold_lanes(lanes)


def ordered_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] float32 times the transpose of weight [N, K] float32 or exactly convertible -> [T, N] float32."""
    tokens, outputs = x.shape[0], weight.shape[0]
    x_blocks, weight_blocks = _blocks(x), _blocks(weight.to(torch.float32))
    result = x.new_empty(tokens, outputs)
    step = max(1, _CHUNK_ELEMENTS // (LANES * max(1, outputs)))
    for begin in range(0, tokens, step):
        rows = slice(begin, begin + step)
        lanes = x.new_zeros(min(step, tokens - begin), outputs, LANES)
        for x_block, weight_block in zip(x_blocks.unbind(0), weight_blocks.unbind(0), strict=True):
            lanes += x_block[rows, None, :] * weight_block[None, :, :]
        result[rows] = fold_lanes(lanes)
    return result


def _blocks(x: Tensor) -> Tensor:
    """[T, K] -> [ceil(K / 16), T, 16], the tail filled with zeros."""
    rows, size = x.shape
    blocks = -(-size // LANES)
    return pad(x, (0, blocks * LANES - size)).view(rows, blocks, LANES).transpose(0, 1).contiguous()
