"""The CPU backend gives the reference's bits, in every instruction-set variant and at odd sizes.

For INT8 experts that is the protocol's promise; for the rest it holds because both keep the same order of sums, and
it is what makes greedy text the same on every CPU. The variant "amx" splits floats into bfloat16 parts in products with
bfloat16 weights and in attention (`split_products`): there it is held to a bound.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    MATRIX_KINDS,
    cached,
    empty_pages,
    expert_weights,
    int4_weight,
    int8_weight,
    kept,
    normal,
    paged,
    pairs,
)
from split_products import assert_split_attention, assert_split_product
from torch import Tensor

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.protocol import (
    ActivationFormat,
    ExpertMatrix,
    GateConfig,
    Int4Matrix,
    IntegerWeight,
    activation_format,
)
from flyray.kernels.reference import ReferenceKernels

SOME = settings(max_examples=40, deadline=None)
FEW = settings(max_examples=15, deadline=None)


@SOME
@given(st.integers(0, 80), st.integers(1, 140), st.integers(1, 80), st.booleans(), st.integers(0, 99))
def test_linear(
    cpu: CpuKernels, reference: ReferenceKernels, tokens: int, inner: int, outputs: int, bfloat: bool, seed: int
) -> None:
    x, weight = normal(seed, tokens, inner), normal(seed + 1, outputs, inner)
    weight = weight.bfloat16() if bfloat else weight
    actual, expected = cpu.linear(x, weight), reference.linear(x, weight)
    residual = normal(seed + 2, tokens, outputs)
    assert torch.equal(cpu.linear(x, weight, residual), residual + actual)
    if bfloat and cpu.splits_floats:
        assert_split_product(actual, expected, x, weight)
    else:
        assert torch.equal(actual, expected)


@SOME
@given(st.integers(0, 80), st.integers(1, 300), st.integers(1, 80), st.integers(0, 99))
def test_linear_int8(
    cpu: CpuKernels, reference: ReferenceKernels, tokens: int, inner: int, outputs: int, seed: int
) -> None:
    x, weight = normal(seed, tokens, inner), int8_weight(outputs, inner, seed)
    x[::3] *= 1e-20
    x[1::7] = 0.0
    assert_integer_linear(cpu, reference, x, weight)


@SOME
@given(st.integers(0, 80), st.integers(1, 12), st.integers(1, 80), st.integers(0, 99))
def test_linear_int4(
    cpu: CpuKernels, reference: ReferenceKernels, tokens: int, groups: int, outputs: int, seed: int
) -> None:
    x, weight = normal(seed, tokens, 32 * groups), int4_weight(outputs, 32 * groups, seed)
    x[::3] *= 1e-20
    x[1::7] = 0.0
    assert_integer_linear(cpu, reference, x, weight)


def assert_integer_linear(cpu: CpuKernels, reference: ReferenceKernels, x: Tensor, weight: IntegerWeight) -> None:
    """Of floats and of INT8 rows, alone and added to what is there."""
    residual, rows = normal(7, len(x), len(weight.scale)), reference.quantize(x, ActivationFormat.INT8)
    for each in (x, rows):
        assert torch.equal(cpu.linear(each, weight), reference.linear(each, weight))
        assert torch.equal(cpu.linear(each, weight, residual), reference.linear(each, weight, residual))


@SOME
@given(st.integers(1, 9), st.integers(1, 140), st.integers(0, 99))
def test_rows(cpu: CpuKernels, reference: ReferenceKernels, tokens: int, size: int, seed: int) -> None:
    x, weight = normal(seed, tokens, size), normal(seed + 1, size)
    assert torch.equal(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    both = normal(seed, tokens, 2 * size) * 30
    assert torch.equal(cpu.silu_mul(both), reference.silu_mul(both))
    slots, weights, others = normal(seed, tokens, 5, size), normal(seed, tokens, 5), normal(seed, 2, tokens, size)
    assert torch.equal(cpu.combine(slots, weights, *others), reference.combine(slots, weights, *others))


@SOME
@given(st.integers(1, 40), st.integers(1, 140), st.integers(0, 9), st.integers(0, 99))
def test_columns_of_a_wider_tensor(
    cpu: CpuKernels, reference: ReferenceKernels, tokens: int, size: int, beside: int, seed: int
) -> None:
    weight, wide = normal(seed, size).bfloat16(), normal(seed, tokens, beside + size + beside)
    x = wide[:, beside : beside + size]
    assert torch.equal(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x.contiguous(), weight, 1e-6))
    normed, rows = cpu.rms_norm_quantize(x, weight, 1e-6)
    assert torch.equal(normed, reference.rms_norm(x, weight, 1e-6))
    quantized = reference.quantize(normed, ActivationFormat.INT8)
    assert quantized.scale is not None
    assert rows.scale is not None
    assert torch.equal(rows.values, quantized.values)
    assert torch.equal(rows.scale, quantized.scale)
    table = normal(seed, 40, 4)
    positions = torch.arange(tokens) % 40
    heads = normal(seed, tokens, 3, size + 8)
    up = normal(seed, 3, 21, size)
    linear = reference.head_linear(heads[..., :size].contiguous(), up)
    assert torch.equal(cpu.head_linear(heads[..., :size], up), linear)
    absorbed = cpu.absorb(heads, up, positions, table.cos(), table.sin())
    assert torch.equal(absorbed, reference.absorb(heads, up, positions, table.cos(), table.sin()))


@SOME
@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_mlp(
    cpu: CpuKernels, reference: ReferenceKernels, tokens: int, hidden: int, inner: int, int4: bool, seed: int
) -> None:
    """With 8-bit weights of any sizes."""
    hidden, inner = (32 * hidden, 32 * inner) if int4 else (29 * hidden, 17 * inner)
    weight = int4_weight if int4 else int8_weight
    gate_up, down = weight(2 * inner, hidden, seed), weight(hidden, inner, seed + 1)
    x = reference.quantize(normal(seed, tokens, hidden), ActivationFormat.INT8)
    assert torch.equal(cpu.mlp(x, gate_up, down), reference.mlp(x, gate_up, down))
    residual = normal(seed + 2, tokens, hidden)
    assert torch.equal(cpu.mlp(x, gate_up, down, residual), reference.mlp(x, gate_up, down, residual))


KV_DTYPES = torch.float32, torch.int8, torch.float8_e4m3fn


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@FEW
@given(st.integers(1, 70), st.integers(1, 140), st.integers(1, 20), st.integers(0, 9), st.integers(0, 99))
def test_write_kv(
    cpu: CpuKernels, kv_dtype: torch.dtype, tokens: int, rank: int, half: int, beside: int, seed: int
) -> None:
    kernels, reference = CpuKernels(2, cpu.variant, kv_dtype), ReferenceKernels(kv_dtype=kv_dtype)
    rows, table = normal(seed, tokens, beside + rank + 2 * half)[:, beside:], normal(seed, 40, half)
    rows[::5] *= 1e-20
    generator = torch.Generator().manual_seed(seed)
    positions, slots = torch.randint(0, 40, (tokens,), generator=generator), torch.randperm(72, generator=generator)
    norm = normal(seed + 1, rank)
    for weight in (norm, norm.bfloat16()):
        arguments = slots[:tokens].contiguous(), rows, weight, 1e-6, positions, table.cos(), table.sin()
        pages = [empty_pages(each, 12, 6, rank, 2 * half) for each in (kernels, reference)]
        for each, own in zip((kernels, reference), pages, strict=True):
            each.write_kv(own, *arguments)
        if kv_dtype is torch.float32 and cpu.splits_floats:
            expected = pages[1].flatten(0, 1)[slots[:tokens]]
            high = expected.bfloat16()
            parts = torch.cat([high, (expected - high.float()).bfloat16()], dim=1)
            assert torch.equal(pages[0].view(torch.bfloat16).flatten(0, 1)[slots[:tokens]], parts)
        else:
            assert torch.equal(pages[0].view(torch.uint8), pages[1].view(torch.uint8))
    kernels.close()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@FEW
@given(
    st.integers(1, 150),
    st.integers(1, 6),
    st.integers(1, 140),
    st.integers(1, 70),
    st.integers(1, 80),
    st.integers(0, 9),
)
def test_attention(
    cpu: CpuKernels, kv_dtype: torch.dtype, new: int, heads: int, past: int, rank: int, page_size: int, seed: int
) -> None:
    kernels, reference = CpuKernels(2, cpu.variant, kv_dtype), ReferenceKernels(kv_dtype=kv_dtype)
    batch, total = paged([new, 1], [new + past, past], page_size, 1, seed)
    pages, q = normal(seed, total, page_size, rank + 6), normal(seed + 1, new + 1, heads, rank + 6) * 3
    entries = cached(kernels, pages, rank), cached(reference, pages, rank)
    if kv_dtype is not torch.float32:
        assert torch.equal(entries[0].view(torch.uint8), entries[1].view(torch.uint8))
    actual, expected = (
        kernels.mla_attention(q, entries[0], batch, 0.4, rank),
        reference.mla_attention(q, entries[1], batch, 0.4, rank),
    )
    kernels.close()
    if cpu.splits_floats:
        assert_split_attention(actual, expected, q, kept(kernels, pages, rank), 0.4)
    else:
        assert torch.equal(actual, expected)


@SOME
@given(st.integers(1, 20), st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 8)]), st.booleans(), st.integers(0, 99))
def test_gate(
    cpu: CpuKernels, reference: ReferenceKernels, tokens: int, groups: tuple[int, int], norm: bool, seed: int
) -> None:
    x, weight, bias = normal(seed, tokens, 45), normal(seed + 1, 40, 45), normal(seed + 2, 40)
    config = GateConfig(5, *groups, norm, 2.5)
    for actual, expected in zip(
        cpu.gate(x, weight, bias, config), reference.gate(x, weight, bias, config), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", MATRIX_KINDS)
@SOME
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 200), st.integers(1, 130), st.integers(0, 99))
def test_experts(
    cpu: CpuKernels,
    reference: ReferenceKernels,
    kind: type[ExpertMatrix],
    count: int,
    experts: int,
    hidden: int,
    inner: int,
    seed: int,
) -> None:
    if kind is Int4Matrix:
        hidden, inner = -(-hidden // 32) * 32, -(-inner // 32) * 32
    weights = expert_weights(kind, experts, hidden, inner, seed)
    token, expert = pairs(7, experts, count, seed)
    x = reference.quantize(normal(seed, 7, hidden), activation_format(weights.down))
    expected = reference.experts(x, token, expert, weights)
    assert torch.equal(cpu.experts(x, token, expert, weights), expected)


@pytest.mark.parametrize("format", [ActivationFormat.INT8, ActivationFormat.FP8])
def test_quantize_every_magnitude(cpu: CpuKernels, reference: ReferenceKernels, format: ActivationFormat) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (500, 37), generator=torch.Generator().manual_seed(1))
    rows = bits.to(torch.int32).view(torch.float32)
    spread = normal(2, 500, 37) * torch.logspace(-45, 30, 500)[:, None]
    for x in (rows, spread):
        actual, expected = cpu.quantize(x, format), reference.quantize(x, format)
        assert actual.scale is not None
        assert expected.scale is not None
        assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(actual.scale.nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))
