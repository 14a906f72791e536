"""Choosing what stays at the high format, against trying all choices; and budgets as people write them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sensitivities import HIGH, LOW, sensitivity, unit

from flyray.cluster.quantize.matrix import QuantizeError
from flyray.cluster.quantize.mixed import Choice, budget_bytes, choose, choose_from_file, unit_loss
from flyray.cluster.quantize.recipe import load_recipe
from flyray.cluster.sensitivity.sensitivity import Sensitivity, SensitivityError, Unit

LOSSES = st.floats(-0.01, 1.0)


@st.composite
def units(draw: st.DrawFn, most: int = 9) -> list[Unit]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=most))
    return [unit(layer, range(size), draw(LOSSES)) for layer, size in enumerate(sizes)]


def chosen(found: list[Unit], budget: str) -> Choice:
    return choose(sensitivity(found), budget, LOW, HIGH)


def least_loss(found: list[Unit], room: int) -> float:
    """By trying every set of units."""
    total = math.fsum(map(unit_loss, found))
    subsets = itertools.chain.from_iterable(itertools.combinations(found, count) for count in range(len(found) + 1))
    fitting = (subset for subset in subsets if sum(len(each.experts) for each in subset) <= room)
    return min(total - math.fsum(map(unit_loss, subset)) for subset in fitting)


@given(found=units(), percent=st.integers(0, 100))
def test_no_choice_within_the_budget_loses_less(found: list[Unit], percent: int) -> None:
    experts = sum(len(each.experts) for each in found)
    limit = budget_bytes(f"{percent}%", experts * LOW, experts * HIGH)
    choice = chosen(found, f"{percent}%")
    assert choice.bytes == experts * LOW + len(choice.high) * (HIGH - LOW) <= limit
    room = (limit - experts * LOW) // (HIGH - LOW)
    assert choice.predicted == pytest.approx(least_loss(found, room), abs=1e-12)
    kept = [each for each in found if (each.layer, each.experts[0]) in choice.high]
    assert choice.high == {(each.layer, expert) for each in kept for expert in each.experts}


@given(found=units(most=30), one=st.integers(0, 100), other=st.integers(0, 100))
def test_a_larger_budget_never_loses_more(found: list[Unit], one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert chosen(found, f"{large}%").predicted <= chosen(found, f"{small}%").predicted + 1e-12


@given(found=units(most=30), percent=st.integers(0, 100), seed=st.randoms(use_true_random=False))
def test_the_order_of_units_does_not_matter(found: list[Unit], percent: int, seed: object) -> None:
    shuffled = list(found)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    assert chosen(found, f"{percent}%") == chosen(shuffled, f"{percent}%")


@given(found=units(most=30))
def test_the_ends_are_all_low_and_all_high(found: list[Unit]) -> None:
    experts = sum(len(each.experts) for each in found)
    low, high = chosen(found, "0%"), chosen(found, "100%")
    assert (low.high, low.bytes) == (frozenset(), experts * LOW)
    assert (high.high, high.bytes, high.predicted) == (sensitivity(found).experts, experts * HIGH, 0.0)


def test_noise_below_zero_is_no_loss() -> None:
    found = [unit(1, [0, 1], -0.5), unit(1, [2, 3], 0.1), unit(2, [0, 1], 0.0)]
    assert chosen(found, "0%").predicted == pytest.approx(0.1)
    assert chosen(found, "34%").high == {(1, 2), (1, 3)}
    assert len(chosen(found, "67%").high) == 4  # what loses nothing fills the budget


def test_units_of_other_sizes_fill_the_gaps() -> None:
    found = [unit(1, range(3), 0.5), unit(2, range(2), 0.35), unit(3, range(2), 0.34)]
    # Loss by size would take layer 2 and then find no room for layer 1; four places hold layers 2 and 3.
    assert {layer for layer, _ in chosen(found, "58%").high} == {2, 3}
    assert {layer for layer, _ in chosen(found, "43%").high} == {1}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("0%", 10**9), ("100%", 2 * 10**9), ("12.5 %", 1_125_000_000), ("1.5 GB", 15 * 10**8), ("1GiB", 2**30)],
)
def test_budgets_as_people_write_them(budget: str, expected: int) -> None:
    assert budget_bytes(budget, 10**9, 2 * 10**9) == expected


@pytest.mark.parametrize("budget", ["", "50", "half", "-1%", "1e3 GB", "5 XB", "kiB 5", "nan%", "50%%", "5 kb%"])
def test_budgets_that_are_none(budget: str) -> None:
    with pytest.raises(QuantizeError, match=r'must be bytes, as "400 GB" or "1.5 GiB", or a share, as "50%"'):
        budget_bytes(budget, 10**9, 2 * 10**9)


def test_budgets_out_of_range_state_the_range() -> None:
    with pytest.raises(QuantizeError, match=r"between 0% \(all low\) and 100%"):
        budget_bytes("101%", 10**9, 2 * 10**9)
    for budget in ("999 MB", "2001 MB"):
        with pytest.raises(QuantizeError, match=r"take 1.000 GB when all are low and 2.000 GB when all are high"):
            budget_bytes(budget, 10**9, 2 * 10**9)
    with pytest.raises(QuantizeError, match=r"take 1\.800 MB when"):
        choose(sensitivity([unit(1, range(3), 0.1)]), "1 B", 600_000, 10**6)
    with pytest.raises(QuantizeError, match="low must be the smaller"):
        choose(sensitivity([unit(1, range(3), 0.1)]), "50%", HIGH, LOW)


def test_a_file_is_checked_against_model_and_recipe(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    mixed = load_recipe("mixed").mixed
    assert mixed
    experts = [(1, 0), (1, 1), (2, 0), (2, 1)]
    found = sensitivity([unit(1, [0, 1], 0.1), unit(2, [0, 1], 0.2)])

    def choice(measured: Sensitivity, experts: list[tuple[int, int]] = experts, fingerprint: str = "model") -> Choice:
        measured.write(file)
        return choose_from_file(
            file, mixed, None, experts=experts, fingerprint=fingerprint, low_bytes=LOW, high_bytes=HIGH
        )

    assert choice(found).high == {(2, 0), (2, 1)}
    # Half of the way for layer 1 alone is no expert of its only group; what the file says of layer 2 does not count.
    assert choice(found, experts[:2]) == Choice(frozenset(), 2 * LOW, pytest.approx(0.1))
    for wrong, words in (
        (lambda: choice(found.model_copy(update={"complete": False})), "complete is false"),
        (lambda: choice(found.model_copy(update={"low": "w4a8"})), "low is w4a8, the recipe's is w4a8-channel"),
        (lambda: choice(found.model_copy(update={"high": "bf16"})), "high is bf16, the recipe's is w8a8"),
        (lambda: choice(found, fingerprint="other"), "fingerprint is that of another model"),
        (lambda: choice(found, [*experts, (3, 7)]), "units lack expert 7 of layer 3"),
        (lambda: choice(found, experts[:3]), "expert 1 of layer 2 in one group with expert 0, but the recipe's mixed"),
    ):
        with pytest.raises(SensitivityError, match=words) as error:
            wrong()
        assert str(file) in str(error.value)
