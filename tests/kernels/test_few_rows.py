"""Integer products of a few rows: every size of a rest, the largest sums, and as many rows as change the way."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import expert_weights, int4_weight, int8_weight, normal, pairs

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.protocol import (
    ActivationFormat,
    Activations,
    ExpertMatrix,
    ExpertWeights,
    Int4Matrix,
    Int4Weight,
    Int8Matrix,
    Int8Weight,
)
from flyray.kernels.reference import ReferenceKernels


@pytest.mark.parametrize("inner", [1, 63, 64, 65, 130, 1024, 1057])
def test_int8_rows_of_every_rest(cpu: CpuKernels, reference: ReferenceKernels, inner: int) -> None:
    for outputs in (1, 2, 3, 5, 37):
        weight = int8_weight(outputs, inner, outputs)
        for tokens in range(1, 6):
            x = normal(tokens, tokens, inner)
            assert torch.equal(cpu.linear(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize("inner", [32, 64, 96, 128, 160, 1024, 1056])
def test_int4_rows_of_every_rest(cpu: CpuKernels, reference: ReferenceKernels, inner: int) -> None:
    for outputs in (1, 2, 3, 5, 37):
        weight = int4_weight(outputs, inner, outputs)
        for tokens in range(1, 6):
            x = normal(tokens, tokens, inner)
            assert torch.equal(cpu.linear(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("value", [-128, 127])
def test_the_largest_sums(cpu: CpuKernels, reference: ReferenceKernels, sign: float, value: int) -> None:
    x, scale = torch.full((2, 8192), sign), torch.ones(9)
    eight = Int8Weight(torch.full((9, 8192), value, dtype=torch.int8), scale)
    nibbles = torch.full((9, 4096), 0 if value < 0 else 255, dtype=torch.uint8)
    four = Int4Weight(nibbles, torch.full((9, 256), 15, dtype=torch.uint8), scale)
    for weight in (eight, four):
        assert torch.equal(cpu.linear(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize("kind", [Int4Matrix, Int8Matrix])
@pytest.mark.parametrize(("hidden", "inner"), [(32, 32), (160, 96), (1056, 64)])
def test_experts_of_few_pairs(
    cpu: CpuKernels, reference: ReferenceKernels, kind: type[ExpertMatrix], hidden: int, inner: int
) -> None:
    """Up to more pairs an expert than are multiplied the one way, with the least int8 among the activations."""
    weights: ExpertWeights = expert_weights(kind, 3, hidden, inner)
    rows = reference.quantize(normal(1, 5, hidden), ActivationFormat.INT8)
    values = rows.values.clone()
    values[2] = -128
    x = Activations(rows.format, values, rows.scale)
    for count in (1, 2, 5, 9, 18, 19, 30):
        token, expert = pairs(5, 3, count, count)
        expected = reference.experts(x, token, expert, weights)
        assert torch.equal(cpu.experts(x, token, expert, weights), expected)


@pytest.mark.parametrize("kind", [Int4Matrix, Int8Matrix])
def test_experts_that_threads_take_whole_or_share(
    cpu: CpuKernels, reference: ReferenceKernels, kind: type[ExpertMatrix]
) -> None:
    """Enough work for both threads: experts in pairs, and one that is left over for both; up to ten tokens each."""
    weights: ExpertWeights = expert_weights(kind, 9, 160, 96)
    x = reference.quantize(normal(1, 10, 160), ActivationFormat.INT8)
    for experts, each in ((1, 3), (1, 10), (2, 9), (3, 6), (5, 3), (4, 9)):
        expert = torch.arange(experts, dtype=torch.int32).repeat_interleave(each)
        token = torch.arange(each, dtype=torch.int32).repeat(experts)
        expected = reference.experts(x, token, expert, weights)
        assert torch.equal(cpu.experts(x, token, expert, weights), expected)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16])
def test_products_that_threads_share(cpu: CpuKernels, reference: ReferenceKernels, tokens: int) -> None:
    x = normal(tokens, tokens, 1056)
    for weight in (int8_weight(331, 1056, 1), int4_weight(331, 1056, 1)):
        assert torch.equal(cpu.linear(x, weight), reference.linear(x, weight))
