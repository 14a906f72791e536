"""Results that answer a step, and those that do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from simulated_shards import MISSING, Bench, expected, generate

from flyray.actors.scheduler import SchedulerError
from flyray.actors.step_plan import NewTokens


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"step": 7}, r"expected \('kimi', 3, 0\)"),
        ({"epoch": 2}, r"expected \('kimi', 3, 0\)"),
        ({"engine": "other"}, r"expected \('kimi', 3, 0\)"),
        ({"shard": 1}, r"results of shards \[1, 1\], expected one of each of 2"),
        ({"tokens": NewTokens()}, r"tokens of sequences \(\), expected of \(0,\)"),
        ({"tokens": NewTokens((0,), (1, 2), (-1.0,))}, r"\(2, 1, 0\) tokens, log probabilities and tops of 1 seq"),
        ({"scores": ()}, r"scores .* \[\], expected \[\(0, 0, 2\)\]"),
        ({"error": "out of memory"}, "step 0, shard 0: out of memory"),
    ],
)
def test_results_that_do_not_fit_change_nothing(change: dict[str, object], text: str) -> None:
    bench = Bench()
    request = generate("a", score_prompt=True)
    bench.add(request)
    bench.schedule()
    good = bench.results[0]
    with pytest.raises(SchedulerError, match=text):
        bench.scheduler.complete([dataclasses.replace(good[0], **change), good[1]])  # type: ignore[arg-type]
    with pytest.raises(SchedulerError, match=r"results of shards \[0\]"):
        bench.scheduler.complete(good[:1])
    bench.drain()
    assert bench.answers["a"] == expected(request)


@pytest.mark.parametrize(
    ("compare", "values", "text"),
    [
        (
            "/kept",
            {"divergences": (0.5,), "agreements": (True, True)},
            "1 divergences and 2 agreements .* expected 2",
        ),
        ("/kept", {"divergences": (), "agreements": ()}, "0 divergences and 0 agreements of sequence 0, expected 2"),
        ("/kept", {"error": "no room"}, "2 divergences and 2 agreements of sequence 0, expected 0"),
        ("", {"divergences": (0.5, 0.5), "agreements": (True, True)}, "2 divergences and 2 agreements .* expected 0"),
    ],
)
def test_comparisons_that_do_not_fit_are_refused(compare: str, values: dict[str, Any], text: str) -> None:
    bench = Bench()
    bench.add(generate("a", score_prompt=True, compare=compare))
    bench.schedule()
    good = bench.results[0]
    scores = tuple(dataclasses.replace(each, **values) for each in good[0].scores)
    with pytest.raises(SchedulerError, match=text):
        bench.scheduler.complete([dataclasses.replace(good[0], scores=scores), good[1]])
    bench.drain()


def test_a_comparison_that_fails_ends_its_request_alone() -> None:
    bench = Bench()
    broken = generate("a", [1] * 14, score_prompt=True, compare=MISSING)  # three slices, two of them on their way
    other = generate("b", [2] * 7, score_prompt=True, compare="/kept")
    bench.add(broken)
    bench.add(other)
    bench.schedule()
    bench.schedule()
    assert [(item.request, item.finish, item.error) for item in bench.complete()] == [
        ("a", "error", "/missing: is not there")
    ]
    bench.drain()
    assert {"a": expected(broken), "b": expected(other)} == bench.answers
