"""Recordings of steps: each from its query on, answered once, complete or as far as it came."""

from __future__ import annotations

from flyray.actors.recordings import LONGEST_TRACE, Recordings
from flyray.actors.request import StatusQuery
from flyray.actors.step_plan import NewTokens, StageTime, StepResult


def results(step: int) -> list[StepResult]:
    stages = (StageTime("embed", step, step + 1),)
    return [StepResult("engine", 0, step, shard, NewTokens(), (), stages, "") for shard in range(2)]


def test_each_has_the_steps_that_were_sent_after_its_query() -> None:
    recordings = Recordings()
    assert not recordings.wanted
    recordings.begin(b"a", StatusQuery("first", 2))
    recordings.sent(5)
    recordings.begin(b"b", StatusQuery("second", 2))
    recordings.sent(6)
    assert recordings.completed(5, results(5)) == []
    assert recordings.wanted
    (first,) = recordings.completed(6, results(6))
    assert (first.client, first.query.query) == (b"a", "first")
    assert [(each.step, each.shard) for each in first.steps] == [(5, 0), (5, 1), (6, 0), (6, 1)]
    recordings.sent(7)
    assert not recordings.wanted
    (second,) = recordings.completed(7, results(7))
    assert [each.step for each in second.steps] == [6, 6, 7, 7]
    assert recordings.completed(8, results(8)) == recordings.end() == []


def test_at_the_end_they_are_answered_as_far_as_they_came() -> None:
    recordings = Recordings()
    recordings.begin(b"a", StatusQuery("long", LONGEST_TRACE + 7))
    recordings.sent(0)
    recordings.completed(0, results(0))
    for step in range(1, LONGEST_TRACE):
        assert recordings.wanted
        recordings.sent(step)
    assert not recordings.wanted
    (ended,) = recordings.end()
    assert [each.step for each in ended.steps] == [0, 0]
    assert recordings.end() == []
