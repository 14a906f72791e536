"""Confidence intervals against closed forms, published values and repeated draws."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.evaluate.intervals import Z95, ratio_of_sums, wilson


def test_wilson_against_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for right, total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        interval = wilson(right, total)
        assert interval.low == pytest.approx(low, abs=5e-5)
        assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_bounds_solve_the_score_equation(case: tuple[int, int]) -> None:
    right, total = case
    interval = wilson(right, total)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    for bound in (interval.low, interval.high):
        # (share - p)^2 = z^2 p (1 - p) / n at both ends
        assert (interval.value - bound) ** 2 == pytest.approx(Z95**2 * bound * (1 - bound) / total, abs=1e-9)


@pytest.mark.parametrize(("right", "total"), [(0, 0), (2, 1), (-1, 3)])
def test_wilson_refuses(right: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{right} of {total} is no share"):
        wilson(right, total)


def test_ratio_of_equal_weights_is_the_mean_with_its_standard_error() -> None:
    values = [1.0, 4.0, 2.5, 3.0, 9.5]
    interval = ratio_of_sums(values, [1.0] * 5)
    mean = sum(values) / 5
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 4)
    assert interval.value == pytest.approx(mean)
    assert interval.high - mean == pytest.approx(Z95 * deviation / math.sqrt(5))
    assert mean - interval.low == pytest.approx(interval.high - mean)


def test_ratio_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(5)
    covered = 0
    for _ in range(1000):
        weights = [float(draw.randint(5, 100)) for _ in range(60)]
        sums = [weight * (2.0 + draw.gauss(0, 0.5)) for weight in weights]
        interval = ratio_of_sums(sums, weights)
        covered += interval.low <= 2.0 <= interval.high
    assert 920 <= covered <= 970


def test_ratio_refuses_what_has_no_spread() -> None:
    for sums, weights in [([1.0], [1.0]), ([1.0, 2.0], [1.0, 0.0]), ([1.0, 2.0], [1.0])]:
        with pytest.raises(ValueError, match="two pieces of positive weight"):
            ratio_of_sums(sums, weights)


def test_map_keeps_the_order() -> None:
    interval = ratio_of_sums([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]).map(math.exp)
    assert interval.value == pytest.approx(math.e**2)
    assert interval.low < interval.value < interval.high
