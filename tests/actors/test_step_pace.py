"""How long the next step's plan is held."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.step_pace import RECENT_STEPS, StepPace

SECONDS = st.floats(0, 100)


@given(took=st.lists(SECONDS, max_size=40), elapsed=SECONDS)
def test_a_plan_leaves_before_the_shortest_recent_step_would_end(took: list[float], elapsed: float) -> None:
    pace = StepPace()
    for seconds in took:
        pace.took(seconds)
    wait = pace.wait(elapsed)
    shortest = min(took[-RECENT_STEPS:], default=0.0)
    assert wait >= 0
    assert wait == 0 or elapsed + wait < shortest
    # Once held for as long as it said, it leaves.
    assert pace.wait(elapsed + wait + 1e-9) == 0


def test_only_recent_steps_count_and_short_ones_are_not_worth_holding_for() -> None:
    pace = StepPace()
    assert pace.wait(0) == 0
    pace.took(0.001)
    assert pace.wait(0) == 0
    for _ in range(RECENT_STEPS):
        pace.took(0.1)
    assert 0.05 < pace.wait(0) < 0.1
