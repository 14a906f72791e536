"""How long the next step's plan is held."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.step_pace import RECENT_STEPS, StepPace

SECONDS = st.floats(0, 100)
TOKENS = st.integers(0, 70)


@given(took=st.lists(st.tuples(TOKENS, SECONDS), max_size=60), tokens=TOKENS, elapsed=SECONDS)
def test_a_plan_leaves_before_the_shortest_like_step_would_end(
    took: list[tuple[int, float]], tokens: int, elapsed: float
) -> None:
    pace = StepPace()
    for step in took:
        pace.took(*step)
    wait = pace.wait(tokens, elapsed)
    like = [seconds for other, seconds in took if other.bit_length() == tokens.bit_length()]
    assert wait >= 0
    assert wait == 0 or elapsed + wait < min(like[-RECENT_STEPS:], default=0.0)
    # Once held for as long as it said, it leaves.
    assert pace.wait(tokens, elapsed + wait + 1e-9) == 0


def test_only_recent_steps_of_about_as_many_tokens_count() -> None:
    pace = StepPace()
    assert pace.wait(5, 0) == 0
    pace.took(5, 0.001)
    pace.took(8, 10)
    assert pace.wait(5, 0) == 0
    for _ in range(RECENT_STEPS):
        pace.took(4, 0.1)
    assert 0.05 < pace.wait(7, 0) < 0.1
    assert pace.wait(15, 0) > 7
