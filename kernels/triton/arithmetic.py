"""Device functions whose every rounding is defined, as in `kernels/ordered.py`: the reference's bits on any GPU.

Kernels that call them are launched with `enable_fp_fusion=False`, for a fused multiply-add rounds once where the
reference rounds twice.
"""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from ..ordered import EXP_COEFFICIENTS, EXP_MAX, EXP_MIN, LN2_HIGH, LN2_LOW, LOG2_E, ROUND_MAGIC, ROUND_MAGIC_BITS

_EXP_MIN: tl.constexpr = tl.constexpr(EXP_MIN)
_EXP_MAX: tl.constexpr = tl.constexpr(EXP_MAX)
_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
_LN2_HIGH: tl.constexpr = tl.constexpr(LN2_HIGH)
_LN2_LOW: tl.constexpr = tl.constexpr(LN2_LOW)
_MAGIC: tl.constexpr = tl.constexpr(ROUND_MAGIC)
_MAGIC_BITS: tl.constexpr = tl.constexpr(ROUND_MAGIC_BITS)
_C0: tl.constexpr = tl.constexpr(EXP_COEFFICIENTS[0])
_C1: tl.constexpr = tl.constexpr(EXP_COEFFICIENTS[1])
_C2: tl.constexpr = tl.constexpr(EXP_COEFFICIENTS[2])
_C3: tl.constexpr = tl.constexpr(EXP_COEFFICIENTS[3])
_C4: tl.constexpr = tl.constexpr(EXP_COEFFICIENTS[4])
_C5: tl.constexpr = tl.constexpr(EXP_COEFFICIENTS[5])


@triton.jit
def ordered_exp(x):
    """`kernels.ordered.ordered_exp` of float32 values."""
    x = tl.minimum(tl.maximum(x, _EXP_MIN, tl.PropagateNan.ALL), _EXP_MAX, tl.PropagateNan.ALL)
    shifted = x * _LOG2_E + _MAGIC
    n = shifted - _MAGIC
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    y = r * _C0 + _C1
    y = y * r + _C2
    y = y * r + _C3
    y = y * r + _C4
    y = y * r + _C5
    y = y * r
    y = y * r
    y = y + r
    y = y + 1.0
    power = ((shifted.to(tl.int32, bitcast=True) - _MAGIC_BITS + 127) << 23).to(tl.float32, bitcast=True)
    return y * power


@triton.jit
def ordered_silu(x):
    """x / (1 + exp(-x)), rounded as the reference rounds."""
    return tl.div_rn(x, ordered_exp(-x) + 1.0)


@triton.jit
def row_scale(largest, finite, LIMIT: tl.constexpr):
    """largest / LIMIT, NaN for a row that is not finite."""
    return tl.where(finite, tl.div_rn(largest, LIMIT), float("nan"))


@triton.jit
def scaled_row(x, scale, LIMIT: tl.constexpr):
    """x / scale within [-LIMIT, LIMIT]; zeros where the scale is 0 or NaN."""
    usable = scale > 0.0
    divisor = tl.where(usable, scale, 1.0) + tl.zeros_like(x)
    value = tl.where(usable, tl.div_rn(x, divisor), 0.0)
    return tl.minimum(tl.maximum(value, -LIMIT), LIMIT)


@triton.jit
def to_int8(x):
    """float32 within [-127, 127] -> the nearest int8, half to even."""
    return ((x + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS).to(tl.int8)


@triton.jit
def to_e4m3(x):
    """float32 within [-448, 448] -> codes of float8_e4m3fn as uint8, half to even; no GPU's own conversion."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(x) * 512.0 + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
    code = tl.where(tl.abs(x) < 0.015625, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(codes):
    """uint8 codes of float8_e4m3fn -> float16 of 2^-8 times their value, exactly; the NaN codes become 480 * 2^-8."""
    wide = codes.to(tl.int16)
    return (((wide & 0x7F) << 7) | ((wide & 0x80) << 8)).to(tl.float16, bitcast=True)


@triton.jit
def exact_bfloat(value):
    """float32 as bfloat16, of which it has the digits: without an instruction that rounds."""
    return (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def nearest_bfloat(value):
    """float32 as the nearest bfloat16, half to even, by integers: the interpreter's own conversion truncates."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
    return exact_bfloat(bits.to(tl.float32, bitcast=True))


@triton.jit
def two_parts(value):
    """float32 as two bfloat16, largest first, within 2^-18 of it."""
    high = value.to(tl.bfloat16)
    return high, (value - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def bfloat_parts(value):
    """float32 as three bfloat16 whose sum it is, largest first: their products with bfloat16 are exact."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)
