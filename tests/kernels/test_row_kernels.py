"""Every backend against float64 oracles: products, norm, rotary embedding, SiLU, combine, experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import MATRIX_KINDS, expert_weights, int8_weight, normal, pairs
from torch import Tensor

from flyray.kernels.kv_entries import ROUNDED, entry_width, pack_entries
from flyray.kernels.protocol import (
    ActivationFormat,
    Bf16Matrix,
    ExpertMatrix,
    ExpertWeights,
    Fp8Matrix,
    Int4Matrix,
    Kernels,
    activation_format,
)
from flyray.kernels.reference import ReferenceKernels, rotate

FEW = settings(max_examples=25, deadline=None)


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    """For results that are no sums of many terms: those may cancel, and are held to the sum of their magnitudes."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    if expected.numel():
        assert float((actual.double() - expected).abs().max()) <= relative * float(expected.abs().max())


def product_error(kernels: Kernels, weight: Tensor) -> float:
    """Of a product, as a share of the sum of its terms' magnitudes: 2^-17 where float32 is split in two bfloat16."""
    return 1e-5 if kernels.splits_floats and weight.dtype is torch.bfloat16 else 1e-6


@FEW
@given(st.integers(0, 9), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_linear(kernels: Kernels, tokens: int, inner: int, outputs: int, bfloat: bool, seed: int) -> None:
    x, weight = normal(seed, tokens, inner), normal(seed + 1, outputs, inner)
    weight = weight.bfloat16() if bfloat else weight
    bound = product_error(kernels, weight) * (x.abs().double() @ weight.abs().double().T)
    product = kernels.linear(x, weight)
    assert bool(((product.double() - x.double() @ weight.double().T).abs() <= bound).all())
    residual = normal(seed + 2, tokens, outputs)
    assert torch.equal(kernels.linear(x, weight, residual), residual + product)


@FEW
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.integers(0, 99))
def test_int8_linear_against_numpy(kernels: Kernels, tokens: int, inner: int, outputs: int, seed: int) -> None:
    x, weight = normal(seed, tokens, inner).numpy(), int8_weight(outputs, inner, seed)
    largest = np.abs(x).max(axis=1, keepdims=True)
    scale = largest / np.float32(127)
    sums = np.rint(x / scale).astype(np.int64) @ weight.values.numpy().astype(np.int64).T
    expected = sums.astype(np.float32) * (scale * weight.scale.numpy()[None])
    assert np.array_equal(kernels.linear(torch.from_numpy(x), weight).numpy(), expected)
    rows, residual = kernels.quantize(torch.from_numpy(x), ActivationFormat.INT8), normal(seed + 1, tokens, outputs)
    assert np.array_equal(kernels.linear(rows, weight, residual).numpy(), residual.numpy() + expected)


def test_an_int8_linear_keeps_rows_that_are_zero_or_not_finite_visible(kernels: Kernels) -> None:
    x = normal(1, 3, 40)
    x[0], x[1, 7] = 0.0, torch.nan
    result = kernels.linear(x, int8_weight(9, 40))
    assert bool((result[0] == 0.0).all())
    assert bool(result[1].isnan().all())
    assert bool(result[2].isfinite().all())


@FEW
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_head_linear(kernels: Kernels, tokens: int, heads: int, inner: int, outputs: int, bfloat: bool) -> None:
    x, weight = normal(1, tokens, heads, inner), normal(2, heads, outputs, inner)
    weight = weight.bfloat16() if bfloat else weight
    bound = product_error(kernels, weight) * torch.einsum("tha,hba->thb", x.abs().double(), weight.abs().double())
    error = kernels.head_linear(x, weight).double() - torch.einsum("tha,hba->thb", x.double(), weight.double())
    assert bool((error.abs() <= bound).all())


@FEW
@given(st.integers(0, 5), st.integers(1, 70), st.booleans())
def test_rms_norm(kernels: Kernels, tokens: int, size: int, bfloat: bool) -> None:
    x, weight = normal(3, tokens, size) * 7, normal(4, size)
    weight = weight.bfloat16() if bfloat else weight
    expected = torch.nn.functional.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    assert_near(kernels.rms_norm(x, weight, 1e-5), expected, 1e-6)


@FEW
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 20))
def test_a_rotation_is_a_complex_product(kernels: Kernels, tokens: int, heads: int, half: int) -> None:
    x = normal(5, tokens, heads, 3 + 2 * half)
    positions = torch.randint(0, 30, (tokens,), generator=torch.Generator().manual_seed(6))
    angles = torch.rand(30, half, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 6
    turn = torch.polar(torch.ones_like(angles), angles)[positions][:, None, :]
    pairs = x[..., 3:].double().unflatten(-1, (half, 2)).contiguous()
    expected = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
    queries = kernels.absorb(x, normal(6, heads, 5, 3), positions, angles.cos().float(), angles.sin().float())
    rounded = kernels.query_dtype is torch.bfloat16
    assert_near(queries[..., 5:].float(), expected, 2.0**-8 if rounded else 1e-6)


def bytes_of(pages: Tensor) -> Tensor:
    return pages.view(torch.uint8).flatten(0, 1)


def test_write_kv_touches_only_its_slots(attending: Kernels) -> None:
    kernels = attending
    pages = normal(8, 4, 3, entry_width(kernels.kv_dtype, 5, 2)).to(kernels.kv_dtype)
    before = pages.clone()
    slots, positions, angles = torch.tensor([11, 0, 5]), torch.tensor([2, 0, 3]), normal(10, 4, 1)
    # Columns of a wider matrix, whose squares have the same sum in any order.
    rows, norm = torch.round(normal(9, 3, 12) * 3)[:, 3:10], normal(11, 5).bfloat16()
    kernels.write_kv(pages, slots, rows, norm, 1e-6, positions, angles.cos(), angles.sin())
    latent = ReferenceKernels().rms_norm(rows[:, :5], norm, 1e-6)
    k_rope = rotate(rows[:, None, 5:], positions, angles.cos(), angles.sin())[:, 0]
    others = [i for i in range(12) if i not in (11, 0, 5)]
    assert torch.equal(bytes_of(pages)[others], bytes_of(before)[others])
    if kernels.kv_dtype in ROUNDED:
        expected = pack_entries(ReferenceKernels().quantize(latent, ROUNDED[kernels.kv_dtype]), k_rope)
        assert torch.equal(bytes_of(pages)[slots], expected)
        return
    flat = pages.view(12, 7)
    written, entries = flat[slots], torch.cat([latent, k_rope], dim=1)
    if kernels.kv_dtype is torch.bfloat16:
        assert torch.equal(written, entries.bfloat16())
    elif kernels.splits_floats:
        high, middle = written.view(torch.bfloat16).split(7, dim=1)
        assert torch.equal(high, entries.bfloat16())
        assert bool(((high.double() + middle.double() - entries).abs() <= 2.0**-17 * entries.abs()).all())
    else:
        assert torch.equal(written, entries)


@FEW
@given(st.integers(0, 5), st.integers(1, 40), st.sampled_from([0.1, 1.0, 40.0]))
def test_silu_mul(kernels: Kernels, tokens: int, size: int, spread: float) -> None:
    gate_up = normal(11, tokens, 2 * size) * spread
    expected = torch.nn.functional.silu(gate_up[:, :size].double()) * gate_up[:, size:].double()
    assert_near(kernels.silu_mul(gate_up), expected, 1e-6)


def test_silu_mul_at_the_ends_of_float32(kernels: Kernels) -> None:
    gate = torch.tensor([-1e38, -200.0, -90.0, 0.0, 90.0, 1e38, torch.inf, torch.nan])
    result = kernels.silu_mul(torch.cat([gate, torch.ones(8)])[None])[0]
    assert result[:2].abs().max() < 1.0  # 1e38 * exp(-88) is not 0, but small
    assert result[3] == 0.0
    assert torch.equal(result[4:7], gate[4:7])
    assert result[7].isnan()


@FEW
@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 40))
def test_combine(kernels: Kernels, tokens: int, top_k: int, size: int) -> None:
    slots, weights, added = normal(12, tokens, top_k, size), normal(13, tokens, top_k), normal(14, 2, tokens, size)
    sizes = torch.einsum("tkd,tk->td", slots.abs().double(), weights.abs().double()) + added.abs().double().sum(0)
    bound = 1e-6 * sizes
    expected = torch.einsum("tkd,tk->td", slots.double(), weights.double()) + added.double().sum(0)
    error = kernels.combine(slots, weights, *added).double() - expected
    assert bool((error.abs() <= bound).all())


def dense(matrix: ExpertMatrix) -> Tensor:
    """[E, N, K] float64 weights by the formulas in the matrix types' docstrings."""
    if isinstance(matrix, Bf16Matrix):
        return matrix.values.double()
    if not isinstance(matrix, Int4Matrix):
        return matrix.values.double() * matrix.scale.double()[..., None]
    experts, rows, half = matrix.nibbles.shape
    values = torch.empty(experts, rows, 2 * half, dtype=torch.float64)
    for k in range(2 * half):
        group, inside = divmod(k, 32)
        byte = matrix.nibbles[..., group * 16 + inside % 16].int()
        nibble = (byte >> 4 if inside >= 16 else byte & 15) - 8
        values[..., k] = nibble * matrix.multipliers[..., group].int()
    return values * matrix.scale.double()[..., None]


# A hidden value on the edge between two numbers of its format may round to either.
EXPERT_BOUNDS = {ActivationFormat.INT8: 5e-3, ActivationFormat.FP8: 3e-2, ActivationFormat.FLOAT: 1e-5}


def rounded(x: Tensor, format: ActivationFormat) -> Tensor:
    """float64 rows rounded to the format and back."""
    largest = x.abs().amax(dim=1, keepdim=True)
    if format is ActivationFormat.FLOAT:
        return x
    if format is ActivationFormat.INT8:
        return (x / (largest / 127)).round() * (largest / 127)
    return (x / (largest / 448)).float().to(torch.float8_e4m3fn).double() * (largest / 448)


@pytest.mark.parametrize("kind", MATRIX_KINDS)
@FEW
@given(st.integers(0, 30), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_experts(
    kernels: Kernels, kind: type[ExpertMatrix], count: int, hidden32: int, inner32: int, seed: int
) -> None:
    odd = 0 if kind is Int4Matrix else 5
    hidden, inner = 32 * hidden32 + odd, 32 * inner32 + odd
    weights = expert_weights(kind, 5, hidden, inner, seed)
    token, expert = pairs(6, 5, count, seed)
    format = activation_format(weights.down)
    x = normal(seed, 6, hidden)
    result = kernels.experts(kernels.quantize(x, format), token, expert, weights)
    rows, up, down = rounded(x.double(), format)[token.long()], dense(weights.gate_up), dense(weights.down)
    both = torch.einsum("pk,pnk->pn", rows, up[expert.long()])
    activated = torch.nn.functional.silu(both[:, :inner]) * both[:, inner:]
    expected = torch.einsum("pk,pnk->pn", rounded(activated, format) if count else activated, down[expert.long()])
    assert_near(result, expected, EXPERT_BOUNDS[format])


def test_fp8_weights_decode_every_code(kernels: Kernels) -> None:
    """With one hidden value, column n of the result is that value times the code in row n of `down`."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)
    count = codes.shape[0]
    gate_up = Fp8Matrix(torch.ones(1, 2, count).to(torch.float8_e4m3fn), torch.full((1, 2), 1 / count))
    weights = ExpertWeights(gate_up, Fp8Matrix(codes.view(1, count, 1), torch.ones(1, count)))
    zero = torch.zeros(1, dtype=torch.int32)
    result = kernels.experts(kernels.quantize(torch.ones(1, count), ActivationFormat.FP8), zero, zero, weights)[0]
    one = result[codes.float() == 1.0]
    assert torch.allclose(result, codes.float() * one, rtol=1e-6, atol=0)
