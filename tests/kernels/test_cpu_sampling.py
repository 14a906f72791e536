"""The CPU backend samples as kernels/sampling.py defines, to the bit, ties and forbidden tokens included."""

from __future__ import annotations

import pytest
import torch
from drawn_rows import logits_and_rows
from hypothesis import given, settings
from kernel_cases import normal

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.protocol import Sampled, SamplingRow
from flyray.kernels.sampling import sample


def assert_same(actual: Sampled, expected: Sampled) -> None:
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(actual, name), tensor), name


@settings(max_examples=60, deadline=None)
@given(logits_and_rows())
def test_every_choice_is_the_references(cpu: CpuKernels, drawn: tuple[torch.Tensor, list[SamplingRow]]) -> None:
    assert_same(cpu.sample(*drawn), sample(*drawn))


def test_a_whole_vocabulary(cpu: CpuKernels) -> None:
    logits = normal(1, 6, 32_000) * 3
    filters = ((1.0, 0, 0.0), (0.9, 50, 0.0), (0.95, 0, 0.02))
    rows = [SamplingRow(t, p, k, 5, 7, m, 20) for t in (0.0, 0.8) for p, k, m in filters]
    assert_same(cpu.sample(logits, rows), sample(logits, rows))


def test_a_row_without_a_largest_is_refused(cpu: CpuKernels) -> None:
    for value in (torch.nan, torch.inf):
        logits = torch.zeros(2, 40)
        logits[1, 3] = value
        with pytest.raises(ValueError, match=rf"largest of logits row 1 is {value}"):
            cpu.sample(logits, [SamplingRow(0.0, 1.0, 0, 0, 0)] * 2)
