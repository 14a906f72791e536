"""Device functions of `drawing`: weights of logits, bins of their distances from the largest, and their order."""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from ..sampling import LEAST_TEMPERATURE, MOST_TEMPERATURE, WEIGHT_BITS, WORDS
from .arithmetic import ordered_exp

ROW_WORDS = tl.constexpr(WORDS)
_LEAST, _MOST = tl.constexpr(LEAST_TEMPERATURE), tl.constexpr(MOST_TEMPERATURE)
POWER = tl.constexpr(float(2**WEIGHT_BITS))
# Adding 2^52 to a smaller float64 rounds it to an integer, half to even, which is left in its low bits.
_INTEGER, _INTEGER_BITS = tl.constexpr(float(2**52)), tl.constexpr(0x4330000000000000)
# Of a number that puts logits in order: the low 20 bits, which hold the id so that a lower one is a larger number.
_IDS = tl.constexpr((1 << 20) - 1)
LOWEST, HIGHEST = tl.constexpr(-(1 << 53)), tl.constexpr(1 << 53)


@triton.jit
def logit_weights(apart):
    """Weights, int64, of float32 distances (z - b) / T."""
    exact = ordered_exp(apart).to(tl.float64) * POWER
    return (exact + _INTEGER).to(tl.int64, bitcast=True) - _INTEGER_BITS


@triton.jit
def logit_bins(apart, BINS: tl.constexpr):
    """Bins of the same distances: 1/16 wide up to 12, 1/3 behind; the one before the last takes all from 33 on, and the
    last is for what is no logit or left out by min-p."""
    far = -apart
    return tl.minimum(tl.minimum(far * 16.0, far * 3.0 + 156.0), BINS - 2.0).to(tl.int32)


@triton.jit
def bin_edge(bin):
    """The distance at which a bin begins."""
    return tl.maximum(bin * 0.0625, (bin - 156.0) * 0.33333334)


@triton.jit
def order_numbers(value, column):
    """int64, larger for the larger logit, then for the lower id."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (key.to(tl.int64) << 20) + (column ^ _IDS)


@triton.jit
def ids_of(number):
    """The ids of such numbers."""
    return ((number & _IDS) ^ _IDS).to(tl.int32)


@triton.jit
def needed_weight(total, top_p):
    """The weight that top-p must reach of `total`."""
    return tl.minimum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), total)


@triton.jit
def row_facts(words, largest, row, parts, PARTS: tl.constexpr):
    """A row's largest logit, NaN where there is a NaN; whether it draws; its temperature; the least logit of min-p."""
    part = tl.arange(0, PARTS)
    each = tl.load(largest + row * parts + part, mask=part < parts, other=float("-inf"))
    top = tl.where(tl.max((each != each).to(tl.int32), 0) > 0, float("nan"), tl.max(each, 0))
    temperature = tl.load(words + row * ROW_WORDS)
    draws = (temperature > 0.0) & (tl.abs(top) < float("inf"))
    divisor = tl.minimum(tl.maximum(temperature, _LEAST), _MOST).to(tl.float32)
    return top, draws, divisor, top.to(tl.float64) + tl.load(words + row * ROW_WORDS + 2)


@triton.jit
def read_logits(logits, column, size, top, divisor, limit, BINS: tl.constexpr):
    """A row's logits at some columns, their distances from the largest, and their bins."""
    inside = column < size
    value = tl.load(logits + column, mask=inside, other=float("-inf"))
    apart = tl.div_rn(value - top, divisor + tl.zeros_like(value))
    left = inside & (value.to(tl.float64) >= limit)
    return value, apart, tl.where(left, logit_bins(apart, BINS), BINS - 1)
