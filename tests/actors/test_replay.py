"""Requests that go on in another engine, or another epoch, behind what their clients have been told."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_shards import CONFIG, VOCAB, Bench, expected, generate


@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    answer=st.integers(1, 20),
    told=st.integers(0, 20),
    stops=st.booleans(),
    scores=st.booleans(),
    cache=st.booleans(),
)
def test_an_engine_goes_on_behind_what_another_one_told(prompt, answer, told, stops, scores, cache) -> None:
    stop = (3,) if stops else ()
    request = generate("whole", prompt, answer, stop_tokens=stop, score_prompt=scores)
    whole = expected(request)
    told = min(told, len(whole.tokens), answer - 1)
    bench = Bench(dataclasses.replace(CONFIG, prefix_cache=cache))
    rest = dataclasses.replace(request, emitted=tuple(whole.tokens[:told]))
    assert bench.add(rest) is None
    bench.drain()
    found = bench.answers["whole"]
    assert (found.tokens, found.logprobs) == (whole.tokens[told:], whole.logprobs[told:])
    assert found.finish == whole.finish
    assert found.scores == ([] if told else whole.scores)


def test_counts_of_penalties_and_bans_go_on() -> None:
    bench = Bench()
    sampling = dataclasses.replace(generate("a").sampling, presence_penalty=1.0, min_tokens=3, stop_ban=(1,))
    bench.add(generate("a", [1, 2], 6, sampling=sampling, emitted=(4, 5)))
    bench.schedule()
    (start,) = [start for shard in bench.shards for start in shard.started]
    assert (start.generated, start.history) == (2, (1, 2, 4, 5))


@pytest.mark.parametrize(
    ("emitted", "says"),
    [
        ((1, 2, 3, 4), "emitted: 4 tokens are all that max_tokens 4 allows"),
        ((1, VOCAB), f"emitted: token {VOCAB} is outside the vocabulary"),
    ],
)
def test_what_cannot_have_been_told_is_refused(emitted: tuple[int, ...], says: str) -> None:
    refusal = Bench().add(generate("a", emitted=emitted))
    assert refusal is not None
    assert refusal.error.startswith(says)
    assert not refusal.lost


@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12),
    requests=st.lists(
        st.tuples(st.integers(1, 10), st.integers(1, 8), st.integers(0, 1), st.booleans()), min_size=1, max_size=8
    ),
    cache=st.booleans(),
)
def test_a_new_epoch_goes_on_with_all_that_ran_or_waited(steps, requests, cache) -> None:
    """steps: how many are scheduled and not completed when the shards are lost, and whether some are before."""
    bench = Bench(dataclasses.replace(CONFIG, prefix_cache=cache))
    asked = [
        generate(str(number), [number % VOCAB] * length, most, priority=priority, score_prompt=scores)
        for number, (length, most, priority, scores) in enumerate(requests)
    ]
    for request in asked:
        bench.add(request)
    for ahead, completes in steps:
        if completes and (bench.results or bench.schedule() is not None):
            bench.complete()
        for _ in range(ahead):
            bench.schedule()
        bench.lose_shards()
    bench.drain()
    assert bench.answers == {request.request: expected(request) for request in asked}


def test_what_is_cancelled_meanwhile_is_gone() -> None:
    bench = Bench()
    bench.add(generate("a"))
    bench.schedule()
    bench.lose_shards()
    assert bench.scheduler.cancel("a")
    assert bench.schedule() is None
