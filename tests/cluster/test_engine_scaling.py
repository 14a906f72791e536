"""How many engines are wanted, by what engines tell Serve's controller."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.engine_scaling import REQUESTS, STARTING, EngineScaling


def context(requests: list[float], starting: int = 0, target: int | None = None) -> Any:
    """What Serve tells a policy of engines with so many requests, and of some that start."""
    replicas = len(requests) + starting
    return SimpleNamespace(
        aggregated_metrics={
            REQUESTS: dict(enumerate([*requests, *[0.0] * starting])),
            STARTING: dict(enumerate([*[0.0] * len(requests), *[1.0] * starting])),
        }
        if replicas
        else {},
        current_num_replicas=replicas,
        target_num_replicas=replicas if target is None else target,
    )


@given(st.lists(st.integers(0, 500).map(float), min_size=1, max_size=9), st.integers(1, 300))
def test_as_many_are_wanted_as_bring_each_to_its_target(requests: list[float], target: int) -> None:
    wanted, _ = EngineScaling(target)(context(requests))
    assert wanted * target >= sum(requests)
    assert (wanted - 1) * target < sum(requests) or wanted == 0


def test_one_that_starts_is_wanted_until_it_can_have_requests() -> None:
    policy = EngineScaling(8)
    assert policy(context([], starting=1))[0] == 1
    assert policy(context([16.0], starting=1))[0] == 2
    assert policy(context([0.0]))[0] == 0


def test_one_that_has_no_room_yet_stays_wanted_and_none_stays_none() -> None:
    policy = EngineScaling(8)
    assert policy(context([], target=1))[0] == 1
    assert policy(context([], target=0))[0] == 0
