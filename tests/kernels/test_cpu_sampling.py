"""The CPU backend samples as kernels/sampling.py defines, to the bit, ties and forbidden tokens included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import normal

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.protocol import Sampled, SamplingRow
from flyray.kernels.sampling import sample

ROWS = st.builds(
    SamplingRow,
    temperature=st.sampled_from([0.0, 1e-40, 0.01, 0.7, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01, 1e-9]),
    top_k=st.sampled_from([0, 1, 3, 50, 10**30]),
    seed=st.integers(0, 2**70),
    position=st.integers(0, 1000),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    top_logprobs=st.sampled_from([0, 1, 5, 20]),
)


def assert_same(actual: Sampled, expected: Sampled) -> None:
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(actual, name), tensor), name


@settings(max_examples=60, deadline=None)
@given(
    st.lists(ROWS, min_size=1, max_size=4),
    st.sampled_from([1, 2, 16, 17, 100, 1003]),
    st.sampled_from([0.1, 1.0, 50.0]),
    st.sampled_from(["as it is", "with ties", "with forbidden tokens", "with both zeros"]),
    st.integers(0, 99),
)
def test_every_choice_is_the_references(
    cpu: CpuKernels, rows: list[SamplingRow], vocabulary: int, spread: float, kind: str, seed: int
) -> None:
    logits = normal(seed, len(rows), vocabulary) * spread
    if kind == "with ties":
        logits = (logits * 2).round() / 2
    elif kind == "with forbidden tokens":
        logits[:, 1::2] = -torch.inf
    elif kind == "with both zeros":
        logits[:, ::3], logits[:, 1::3] = -0.0, 0.0
    assert_same(cpu.sample(logits, rows), sample(logits, rows))


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
