"""Error feedback: the same integers as a plain float64 GPTQ, less output error than rounding to the nearest."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from feedback_oracle import rounded_with_feedback
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flyray.cluster.quantize.error_feedback import (
    DAMPING,
    ROW_GROUP,
    MomentsError,
    SecondMoments,
    round_with_feedback,
)

LIMITS = (-8, 7)
# A row that comes this close to a tie (in steps) may be rounded either way in float32.
CLOSE = 1e-3
MANY = 1 << 40
"""Tokens, where the moments are to be trusted."""


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs [tokens, columns] of a few strong directions, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns).unsqueeze(1)
    return torch.randn(tokens, columns, generator=generator) @ directions


def diagonal_blocks(inputs: Tensor, size: int) -> Tensor:
    cut = inputs.unflatten(1, (-1, size)).movedim(1, 0)
    return cut.mT @ cut


def row_scales(weight: Tensor) -> Tensor:
    return weight.abs().amax(1, keepdim=True) / 7


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 12),
    blocks=st.integers(1, 3),
    size=st.integers(1, 41),
    groups=st.integers(1, 2),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_as_a_plain_gptq_in_float64(rows: int, blocks: int, size: int, groups: int, wide: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size *= groups
    columns = blocks * size
    limits = (-127, 127) if wide else LIMITS
    weight = torch.randn(rows, columns, generator=generator)
    scale = weight.unflatten(1, (groups, -1)).abs().amax(-1) / limits[1] * 0.8
    moments = diagonal_blocks(correlated(2 * size, columns, seed), size)
    found = round_with_feedback(weight, scale, limits, SecondMoments(moments, MANY))
    spread = scale.repeat_interleave(columns // groups, 1).double().numpy()
    for block in range(blocks):
        part = slice(block * size, (block + 1) * size)
        values, margin = rounded_with_feedback(
            weight[:, part].double().numpy(), spread[:, part], limits, moments[block].double().numpy(), DAMPING
        )
        clear = margin > CLOSE
        assert np.array_equal(found[:, part].numpy()[clear], values[clear])


def test_the_oracle_is_compared_with_most_rows() -> None:
    """The margin above leaves out few rows: here, of 4 bits and 40 columns."""
    weight = torch.randn(256, 40, generator=torch.Generator().manual_seed(1))
    moments = diagonal_blocks(correlated(80, 40), 40)[0]
    scale = row_scales(weight).expand(-1, 40)
    _, margin = rounded_with_feedback(
        *(x.double().numpy() for x in (weight, scale)), LIMITS, moments.double().numpy(), 0.01
    )
    assert (margin > CLOSE).mean() > 0.8


@pytest.mark.parametrize(("size", "at_most"), [(256, 0.5), (64, 0.85)])
def test_less_output_error_than_to_the_nearest(size: int, at_most: float) -> None:
    seen, unseen = correlated(2048, 256).chunk(2)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    scale = row_scales(weight)
    values = round_with_feedback(weight, scale, LIMITS, SecondMoments(diagonal_blocks(seen, size), MANY))
    nearest = (weight / scale).round()
    error, plain = (((x * scale - weight) @ unseen.T).norm() for x in (values, nearest))
    assert error < at_most * plain


@pytest.mark.parametrize("tokens", [4, 16, 64])
def test_few_tokens_are_trusted_little(tokens: int) -> None:
    """Of fewer tokens than columns there are directions that no token saw."""
    unseen = correlated(4096, 256)
    seen = unseen[:tokens]
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    scale = row_scales(weight)
    errors = []
    for trust in (tokens, MANY):
        values = round_with_feedback(weight, scale, LIMITS, SecondMoments(diagonal_blocks(seen, 256), trust))
        errors.append(((values * scale - weight) @ unseen.T).norm())
    nearest = ((weight / scale).round() * scale - weight) @ unseen.T
    assert errors[0] < nearest.norm()
    assert errors[0] < 0.97 * errors[1]


def test_uncorrelated_inputs_leave_rounding_to_the_nearest() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(3))
    scale = row_scales(weight)
    moments = torch.diag_embed(torch.rand(3, 32, generator=torch.Generator().manual_seed(4)) + 0.1)
    found = round_with_feedback(weight, scale, LIMITS, SecondMoments(moments, MANY))
    assert torch.equal(found, (weight / scale).round().to(torch.int8))


def test_columns_that_no_input_reached_are_rounded_to_the_nearest_and_carry_nothing() -> None:
    inputs = correlated(128, 64)
    inputs[:, 5::9] = 0
    dead = inputs.abs().amax(0) == 0
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    scale = row_scales(weight)
    moments = diagonal_blocks(inputs, 64)
    values = round_with_feedback(weight, scale, LIMITS, SecondMoments(moments, MANY))
    assert torch.equal(values[:, dead], (weight / scale).round().to(torch.int8)[:, dead])
    weight[:, dead] = 0  # whatever stands there, the other columns are rounded alike
    again = round_with_feedback(weight, scale, LIMITS, SecondMoments(moments, MANY))
    assert torch.equal(again[:, ~dead], values[:, ~dead])


def test_moments_of_zeros_leave_rounding_to_the_nearest() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(6))
    scale = row_scales(weight)
    found = round_with_feedback(weight, scale, LIMITS, SecondMoments(torch.zeros(2, 16, 16), MANY))
    assert torch.equal(found, (weight / scale).round().to(torch.int8))


def test_a_row_of_scale_0_is_0() -> None:
    weight = torch.zeros(2, 16)
    weight[1] = 1
    found = round_with_feedback(
        weight, row_scales(weight), LIMITS, SecondMoments(diagonal_blocks(correlated(32, 16), 16), MANY)
    )
    assert not bool(found[0].any())
    assert bool(found[1].any())


def test_moments_scaled_by_any_number_give_the_same_integers() -> None:
    """Sums over many tokens or few; a power of two, so that float32 rounds alike."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(7))
    moments = diagonal_blocks(correlated(128, 64), 64)
    found = [
        round_with_feedback(weight, row_scales(weight), LIMITS, SecondMoments(moments * factor, MANY))
        for factor in (1.0, 2.0**40, 2.0**-40)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_result_does_not_depend_on_threads_or_on_other_rows(four_threads: None) -> None:
    weight = torch.randn(2 * ROW_GROUP + 3, 128, generator=torch.Generator().manual_seed(8))
    inputs = correlated(256, 128)
    many = round_with_feedback(weight, row_scales(weight), LIMITS, SecondMoments(diagonal_blocks(inputs, 128), MANY))
    assert torch.get_num_threads() == 4
    torch.set_num_threads(1)
    last = weight[ROW_GROUP:]
    alone = round_with_feedback(last, row_scales(last), LIMITS, SecondMoments(diagonal_blocks(inputs, 128), MANY))
    assert torch.equal(many[ROW_GROUP:], alone)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        (torch.zeros(2, 8, 4), "expected float"),
        (torch.zeros(8, 8), "expected float"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), "expected float"),
    ],
)
def test_what_is_no_block_of_moments_is_refused(blocks: Tensor, says: str) -> None:
    with pytest.raises(MomentsError, match=says):
        SecondMoments(blocks, MANY)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (torch.tensor([[1.0, 0.0], [0.0, float("nan")]]), "columns from 2 on are negative or not finite"),
        (torch.tensor([[1.0, float("inf")], [float("inf"), 1.0]]), "columns from 2 on are negative or not finite"),
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "columns from 2 on are negative or not finite"),
        (torch.tensor([[1.0, 5.0], [5.0, 1.0]]), "columns from 2 on are not positive definite"),
    ],
)
def test_what_cannot_be_moments_is_refused(block: Tensor, says: str) -> None:
    with pytest.raises(MomentsError, match=says):
        _ = SecondMoments(torch.stack([torch.eye(2), block]), MANY).factor


def test_moments_of_no_token_are_refused() -> None:
    with pytest.raises(MomentsError, match="second moments of 0 tokens, expected at least 1"):
        SecondMoments(torch.eye(4).unsqueeze(0), 0)


def test_moments_that_do_not_fit_the_weight_are_refused() -> None:
    moments = SecondMoments(torch.eye(16).expand(2, 16, 16), MANY)
    with pytest.raises(MomentsError, match=r"second moments of 32 columns and 1 scales a row do not fit .*\[4, 48\]"):
        round_with_feedback(torch.ones(4, 48), torch.ones(4, 1), LIMITS, moments)
    with pytest.raises(MomentsError, match="3 scales a row"):
        round_with_feedback(torch.ones(4, 32), torch.ones(4, 3), LIMITS, moments)
