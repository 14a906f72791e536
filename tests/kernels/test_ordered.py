from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from flyray.kernels.ordered import LANES, fold_lanes, ordered_exp, ordered_sigmoid, ordered_sum


def test_exp_is_within_its_stated_error() -> None:
    x = torch.linspace(-87.0, 88.0, 2_000_003)
    exact = x.double().exp()
    assert float(((ordered_exp(x).double() - exact) / exact).abs().max()) < 1.0e-7


def test_exp_outside_its_range_and_at_zero() -> None:
    ends = ordered_exp(torch.tensor([-torch.inf, -1e30, -87.0, 0.0, 88.0, 1e30, torch.inf, torch.nan]))
    assert ends[0] == ends[1] == ends[2]
    assert 1.6e-38 < float(ends[0]) < 1.7e-38
    assert ends[3] == 1.0
    assert ends[4] == ends[5] == ends[6]
    assert bool(ends[4].isfinite())
    assert ends[7].isnan()


def test_sigmoid_saturates_without_overflow() -> None:
    values = ordered_sigmoid(torch.tensor([-1000.0, 0.0, 1000.0]))
    assert float(values[0]) < 1e-37
    assert values[1:].tolist() == [0.5, 1.0]


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=60))
def test_sum_follows_the_documented_order(values: list[float]) -> None:
    lanes = [torch.tensor(0.0) for _ in range(LANES)]
    for index, value in enumerate(values):
        lanes[index % LANES] = lanes[index % LANES] + torch.tensor(value)
    expected = fold_lanes(torch.stack(lanes)[None])
    assert torch.equal(ordered_sum(torch.tensor([values])), expected)


def test_fold_is_by_halves() -> None:
    lanes = torch.zeros(1, LANES)
    # 2^24 + 1 is not a float32: only a fold that adds the two ones first keeps them.
    lanes[0, 0], lanes[0, 1], lanes[0, 9] = 2.0**24, 1.0, 1.0
    assert float(fold_lanes(lanes)) == 2.0**24 + 2
