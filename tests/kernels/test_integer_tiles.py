"""The CPU's integer products where they split their work: many tokens of one expert, rows that cannot be quantized."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import expert_weights, int4_weight, int8_weight, normal, pairs

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.protocol import ActivationFormat, ExpertMatrix, Int4Matrix, Int8Matrix
from flyray.kernels.reference import ReferenceKernels

KINDS: tuple[type[ExpertMatrix], ...] = (Int4Matrix, Int8Matrix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("hidden", "inner"), [(64, 64), (160, 224), (256, 128)])
def test_experts_of_very_different_loads(
    cpu: CpuKernels, reference: ReferenceKernels, kind: type[ExpertMatrix], hidden: int, inner: int
) -> None:
    """One expert with more tokens than are multiplied at once, others with 0 to 17."""
    counts = [1100, 0, 1, 2, 3, 4, 5, 8, 9, 16, 17]
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(torch.int32)
    expert = expert[torch.randperm(len(expert), generator=torch.Generator().manual_seed(1))]
    token = pairs(50, 1, len(expert), 2)[0]
    weights = expert_weights(kind, len(counts), hidden, inner)
    x = reference.quantize(normal(3, 50, hidden), ActivationFormat.INT8)
    assert torch.equal(cpu.experts(x, token, expert, weights), reference.experts(x, token, expert, weights))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 7, 40])
def test_rows_of_zeros_and_of_no_numbers_stay_alone(
    cpu: CpuKernels, reference: ReferenceKernels, kind: type[ExpertMatrix], count: int
) -> None:
    weights = expert_weights(kind, 2, 96, 160)
    rows = normal(4, 4, 96) * torch.tensor([1.0, 0.0, torch.nan, 1e-37])[:, None]
    x = reference.quantize(rows, ActivationFormat.INT8)
    token, expert = pairs(4, 2, count, 5)
    actual, expected = cpu.experts(x, token, expert, weights), reference.experts(x, token, expert, weights)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize(("tokens", "inner", "outputs"), [(1, 64, 16), (530, 64, 48), (33, 96, 40), (2, 704, 33)])
def test_linear_int4(cpu: CpuKernels, reference: ReferenceKernels, tokens: int, inner: int, outputs: int) -> None:
    x, weight = normal(6, tokens, inner), int4_weight(outputs, inner)
    assert torch.equal(cpu.linear(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize(("tokens", "inner", "outputs"), [(1, 64, 16), (530, 64, 48), (33, 100, 40), (2, 700, 33)])
def test_linear_int8(cpu: CpuKernels, reference: ReferenceKernels, tokens: int, inner: int, outputs: int) -> None:
    x, weight = normal(6, tokens, inner), int8_weight(outputs, inner)
    assert torch.equal(cpu.linear(x, weight), reference.linear(x, weight))
