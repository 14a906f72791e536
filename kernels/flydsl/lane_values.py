"""What a lane computes with while FlyDSL traces a kernel: words, vectors of four, the reference's float functions."""

# FlyDSL traces these functions; its values are typed for its compiler.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportFunctionMemberAccess=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import flydsl.expr as fx
from flydsl.expr import rocdl
from flydsl.expr.typing import Vector

from ..ordered import EXP_COEFFICIENTS, EXP_MAX, EXP_MIN, LN2_HIGH, LN2_LOW, LOG2_E, ROUND_MAGIC, ROUND_MAGIC_BITS


def multiply_add(x: fx.Int32, factor: fx.Int32, added: fx.Int32) -> fx.Int32:
    """`v_pk_mad_u16`: factor and added by their low half in both halves."""
    halves = Vector.from_elements([fx.Int32(x)], fx.Int32).bitcast(fx.Int16)
    factors, offsets = (Vector.filled(2, fx.Int32(each).to(fx.Int16), fx.Int16) for each in (factor, added))
    return fx.Int32((halves * factors + offsets).bitcast(fx.Int32)[0])


def matrix_product(left: list, right: list, total: Vector) -> Vector:
    """total + 16 rows by 16 tokens of 32 values of K: two words of bytes a lane of each factor."""
    pairs = [Vector.from_elements(words, fx.Int32).bitcast(fx.Int64)[0].ir_value() for words in (left, right)]
    return as_words(rocdl.mfma_i32_16x16x32_i8(four_words(), [*pairs, total.ir_value(), 0, 0, 0]))


def _exp(x: fx.Float32) -> fx.Float32:
    """`kernels.ordered.ordered_exp`."""
    x = fx.min(fx.max(x, fx.Float32(EXP_MIN)), fx.Float32(EXP_MAX))
    shifted = x * fx.Float32(LOG2_E) + fx.Float32(ROUND_MAGIC)
    n = shifted - fx.Float32(ROUND_MAGIC)
    r = x - n * fx.Float32(LN2_HIGH)
    r = r - n * fx.Float32(LN2_LOW)
    y = fx.Float32(EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        y = y * r + fx.Float32(coefficient)
    y = y * r * r + r + fx.Float32(1.0)
    power = (shifted.bitcast(fx.Int32) - fx.Int32(ROUND_MAGIC_BITS - 127)) << fx.Int32(23)
    return y * power.bitcast(fx.Float32)


def silu(x: fx.Float32) -> fx.Float32:
    """`kernels.ordered.ordered_silu`."""
    return x / (_exp(fx.Float32(0.0) - x) + fx.Float32(1.0))


def load_word(tensor, at):
    """One int32."""
    return fx.Int32(fx.ptr_load(fx.get_iter(tensor) + at))


def load_quad(buffer, at):
    """16 bytes; zeros from beyond the buffer."""
    return rocdl.raw_ptr_buffer_load(four_words(), buffer, at, fx.Int32(0))


def four_words():
    return Vector.make_type(4, fx.Int32)


def as_words(value) -> Vector:
    return Vector(value, (4,), fx.Int32)


def as_vectors(values) -> list[Vector]:
    return [as_words(each) for each in values]


def elements(vector: Vector) -> list[fx.Int32]:
    return [fx.Int32(vector[i]) for i in range(4)]
