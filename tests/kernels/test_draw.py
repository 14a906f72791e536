"""Tokens that are drawn without waiting for the device are those of kernels/sampling.py, to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_rows import logits_and_rows
from hypothesis import given, settings
from kernel_cases import normal

from flyray.kernels.protocol import AheadKernels, SamplingRow
from flyray.kernels.sampling import SamplingRows, sample, uniform, uniforms
from flyray.kernels.torch_kernels import TorchKernels


@pytest.fixture(scope="module", params=["torch", "triton"])
def ahead(request: pytest.FixtureRequest) -> AheadKernels:
    if request.param == "torch":
        return TorchKernels(torch.device("cpu"))
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from flyray.kernels.triton.backend import TritonKernels

    return TritonKernels(torch.device("cuda:0"))


def assert_drawn(ahead: AheadKernels, logits: torch.Tensor, rows: list[SamplingRow]) -> None:
    rows = [replace(row, top_logprobs=0) for row in rows]
    drawn = ahead.draw(logits.to(ahead.device), SamplingRows(rows).words.to(ahead.device))
    expected = sample(logits, rows)
    assert torch.equal(drawn.tokens.cpu(), expected.tokens)
    assert torch.equal(drawn.largest.cpu(), logits.amax(1))
    torch.testing.assert_close(drawn.logprobs.cpu(), expected.logprobs, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(logits_and_rows())
def test_every_choice_is_the_definitions(ahead: AheadKernels, drawn: tuple[torch.Tensor, list[SamplingRow]]) -> None:
    assert_drawn(ahead, *drawn)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.7, 6.0])
def test_a_whole_vocabulary(ahead: AheadKernels, spread: float) -> None:
    """From one whose logits are all equal to one of few probable tokens."""
    filters = (0.0, 1.0, 0, 0.0), (1.0, 1.0, 0, 0.0), (1.0, 0.95, 0, 0.0), (0.6, 0.9, 50, 0.01), (2.0, 0.999, 300, 0.0)
    rows = [SamplingRow(t, p, k, 5, 7, m) for t, p, k, m in filters]
    assert_drawn(ahead, normal(1, len(rows), 20_000) * spread, rows)


def test_random_numbers_of_many_rows_at_once() -> None:
    seeds, positions = [0, 7, 2**64 - 1, 12345678901234567890], [0, 3, 2**40, 1]
    expected = [uniform(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    assert uniforms(np.array(seeds, np.uint64), np.array(positions)).tolist() == expected
