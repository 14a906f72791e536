"""What products of float32 split into two bfloat16 parts may lose: bounds from the parts, not from what was measured.

A value's two parts are within 2^-18 of it. Of two split factors the product of the second parts is left out, 2^-18 at
most. The rest, of the bounds of 2^-16 here, is for sums in float32.
"""

from __future__ import annotations

from torch import Tensor

ERROR = 2.0**-16
FLOAT_ERROR = 2.0**-22
"""Of a sum of some dozens of products in float32, each of which is within 2^-24."""
ROUNDED_SCORE, ROUNDED_VALUE = 2.0**-8 + 2.0**-15, 2.0**-7
"""Of scores whose queries and entries are rounded to bfloat16, and of values whose shares, entries and splits are: each
rounding is within 2^-9."""
ROW_ERROR = 1e-4
"""Of a row's largest; what the protocol says."""


def assert_split_product(actual: Tensor, expected: Tensor, x: Tensor, weight: Tensor) -> None:
    """x [T, K] times the transpose of weight [N, K]: every element within the bound of its sum of magnitudes."""
    allowed = ERROR * (x.abs().double() @ weight.abs().double().T)
    assert bool(((actual.double() - expected.double()).abs() <= allowed).all())


def assert_split_attention(actual: Tensor, expected: Tensor, q: Tensor, keys: Tensor, scale: float) -> None:
    """A score is off by the bound of its sum of magnitudes, which a share feels twice, and values by the bound."""
    _assert_attention(actual, expected, q, keys, scale, ERROR, ERROR)


def assert_rounded_attention(actual: Tensor, expected: Tensor, q: Tensor, keys: Tensor, scale: float) -> None:
    """The same where queries, entries and shares are bfloat16."""
    _assert_attention(actual, expected, q, keys, scale, ROUNDED_SCORE, ROUNDED_VALUE)


def assert_float_attention(actual: Tensor, expected: Tensor, q: Tensor, keys: Tensor, scale: float) -> None:
    """The same of products in float32, for contexts of a few hundred entries."""
    _assert_attention(actual, expected, q, keys, scale, FLOAT_ERROR, 4e-6)


def _assert_attention(
    actual: Tensor, expected: Tensor, q: Tensor, keys: Tensor, scale: float, of_score: float, of_value: float
) -> None:
    if not actual.numel():
        return
    entries = keys.flatten(0, -2).double().abs().nan_to_num(0.0)
    magnitude = float((q.flatten(0, -2).double().abs() @ entries.T).max()) * scale
    allowed = (of_value + 2.0 * of_score * magnitude) * float(entries[:, : actual.shape[-1]].max())
    assert float((actual.double() - expected.double()).abs().max()) <= allowed
    assert actual.isfinite().all()


def assert_near_rows(actual: Tensor, expected: Tensor) -> None:
    """Every row within the protocol's bound of its largest."""
    wanted = expected.double()
    error = (actual.double() - wanted).abs().amax(dim=-1)
    assert bool((error <= ROW_ERROR * wanted.abs().amax(dim=-1)).all())
