"""Placements: whole, full, balanced, deterministic, and with as few moves as may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.expert_balance import balanced, imbalance, moves, shard_loads
from flyray.actors.expert_placement import LayerPlacement


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, LayerPlacement]:
    """Loads, some of them 0 or alike or far above the others, and a placement that may be any."""
    shards = draw(st.integers(1, 6))
    experts = draw(st.integers(shards, 24))
    redundant = draw(st.integers(0, min(4, experts - -(-experts // shards))))
    values = st.one_of(st.integers(0, 3), st.integers(0, 10_000))
    loads = np.array(draw(st.lists(values, min_size=experts, max_size=experts)), np.float64)
    order = draw(st.permutations(range(experts)))
    plain = LayerPlacement.contiguous(experts, shards, redundant)
    return loads, LayerPlacement(tuple(tuple(order[expert] for expert in held) for held in plain.held))


@given(layer=layers())
def test_placements_are_whole_and_never_worse_than_now_or_contiguous(layer: tuple[np.ndarray, LayerPlacement]) -> None:
    loads, current = layer
    found = balanced(loads, current)  # LayerPlacement itself refuses missing experts, and two on one shard
    assert found.sizes == current.sizes
    assert found.experts == current.experts
    shards = len(current.sizes)
    redundant = (sum(current.sizes) - current.experts) // shards
    peak = shard_loads(loads, found).max()
    for other in (current, LayerPlacement.contiguous(current.experts, shards, redundant)):
        assert peak <= shard_loads(loads, other).max() * (1 + 1e-12)
    assert balanced(loads, current) == found
    assert balanced(loads, found) == found, "nothing moves twice for the same loads"
    assert shard_loads(loads, found).sum() == pytest.approx(loads.sum())


def test_a_hot_expert_gets_replicas_and_what_is_balanced_stays() -> None:
    current = LayerPlacement.contiguous(8, 4, 1)
    loads = np.ones(8)
    assert balanced(loads, current) == current
    loads[5] = 9.0
    found = balanced(loads, current)
    assert len(found.replicas()[5]) >= 3
    assert imbalance(loads[None], [current]) > 1.5 > 1.15 > imbalance(loads[None], [found])


def test_few_experts_move_for_a_small_change() -> None:
    random = np.random.default_rng(0)
    loads = random.pareto(1.5, 384) + 0.1
    current = LayerPlacement.contiguous(384, 8, 4)
    first = balanced(loads, current)
    assert imbalance(loads[None], [current]) > 1.5 > 1.02 > imbalance(loads[None], [first])
    loads[int(loads.argmin())] += 0.5 * loads.sum() / 8
    then = balanced(loads, first)
    assert imbalance(loads[None], [then]) < 1.05
    assert 0 < moves(then, first) < 20
    assert 0 < moves(first, current) < 40


def test_without_load_nothing_moves_and_nothing_is_out_of_balance() -> None:
    current = LayerPlacement.contiguous(6, 3)
    assert balanced(np.zeros(6), current) == current
    assert imbalance(np.zeros((1, 6)), [current]) == 0.0


@pytest.mark.parametrize(
    ("held", "named"),
    [
        (((0, 1), (3,)), "expert 2 is on no shard"),
        (((0, 1), (2, 2)), "expert 2 is on shard 1 more than once"),
        (((),), "expert 0 is on no shard"),
    ],
)
def test_a_placement_without_an_expert_or_with_one_twice_is_refused(held: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LayerPlacement(held)


def test_contiguous_experts_with_redundant_slots() -> None:
    assert LayerPlacement.contiguous(5, 2, 1).held == ((0, 1, 2, 3), (3, 4, 0))
    with pytest.raises(ValueError, match="redundant_experts: 3 slots beside a shard's own 3 are more"):
        LayerPlacement.contiguous(5, 2, 3)
