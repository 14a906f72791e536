"""Who is preempted, for whom, and what becomes of it: the scheduler with few pages, on simulated shards."""

from __future__ import annotations

import dataclasses

import pytest
from simulated_shards import CONFIG, Bench, expected, generate


def test_the_latest_is_preempted_when_pages_run_out() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1, num_pages=6))
    requests = [generate(name, [token] * 7, 10) for token, name in enumerate("abc")]
    for request in requests:
        bench.add(request)
    bench.schedule()
    assert (bench.scheduler.stats.running, bench.scheduler.stats.waiting) == (2, 1)
    bench.drain()
    assert bench.answers == {request.request: expected(request) for request in requests}
    assert bench.scheduler.stats.preemptions == 2
    names = [bench.request_of(requests)[start.sequence].request for start in bench.shards[0].started]
    assert names == ["a", "b", "b", "c", "c"], "the preempted one runs again before those that came later"


def test_interactive_requests_preempt_batch_ones_for_pages() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1, num_pages=8))
    batch = [generate(f"batch {token}", [token] * 8, 4, priority=1) for token in range(2)]
    chat = generate("chat", [5] * 12, 4)
    for request in batch:
        bench.add(request)
    for _ in range(3):
        bench.schedule()
        bench.complete()
    bench.add(chat)
    plans = bench.schedule()
    assert plans is not None
    assert [start.sequence for start in plans[0].starts] == [2]
    assert plans[0].ends == (1,), "the later one, and no more than must be"
    bench.drain()
    assert bench.answers == {request.request: expected(request) for request in (*batch, chat)}
    assert bench.scheduler.stats.preemptions == 1


def test_interactive_requests_preempt_batch_ones_for_their_place() -> None:
    bench = Bench(dataclasses.replace(CONFIG, max_sequences=2))
    requests = [generate(f"batch {token}", [token] * 4, 6, priority=1) for token in range(2)]
    for request in requests:
        bench.add(request)
    bench.schedule()
    for number in range(3):
        requests.append(generate(f"chat {number}", [5] * 4, 3))
        bench.add(requests[-1])
    bench.schedule()
    stats = bench.scheduler.stats
    assert (stats.running, stats.waiting, stats.preemptions) == (2, 3, 2)
    bench.drain()
    assert {name: answer.tokens for name, answer in bench.answers.items()} == {
        request.request: expected(request).tokens for request in requests
    }


@pytest.mark.parametrize("scarce", [{"max_sequences": 1}, {"num_pages": 4}])
def test_nothing_is_preempted_while_its_prompt_is_scored(scarce: dict[str, int]) -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1, **scarce))
    scored = generate("scored", [1] * 12, 4, priority=1, score_prompt=True)
    chat = generate("chat", [2] * 8, 1)
    bench.add(scored)
    bench.schedule()
    bench.add(chat)
    bench.schedule()
    assert bench.scheduler.stats.waiting == 1
    bench.complete()
    bench.complete()  # the scores are told
    bench.schedule()
    assert bench.scheduler.stats.preemptions == 1
    bench.drain()
    assert bench.answers == {"scored": expected(scored), "chat": expected(chat)}


def test_a_preempted_request_takes_its_last_tokens_and_may_end_with_them() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1, max_sequences=1))
    batch, chat = generate("batch", [1, 2, 3], 2, priority=1), generate("chat", [2] * 4, 1)
    bench.add(batch)
    bench.schedule()
    bench.schedule()
    bench.add(chat)
    bench.schedule()
    assert (bench.scheduler.stats.preemptions, bench.scheduler.stats.waiting) == (1, 1)
    bench.complete()
    bench.complete()
    assert bench.answers["batch"] == expected(batch)
    bench.drain()
    assert len(bench.shards[0].started) == 2


def test_a_preempted_request_does_not_run_before_its_last_tokens_are_known() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1, max_sequences=1))
    batch = generate("batch", [1, 2, 3], 6, priority=1)
    bench.add(batch)
    bench.schedule()
    bench.schedule()
    bench.add(generate("chat", [2] * 4, 1))
    bench.schedule()
    assert bench.scheduler.cancel("chat")
    plans = bench.schedule()
    assert plans is not None
    assert (plans[0].starts, plans[0].ends) == ((), (1,))
    bench.drain()
    assert bench.answers["batch"] == expected(batch)
    assert [start.generated for start in bench.shards[0].started] == [0, 0, 2]


def test_pages_are_not_taken_from_a_prompt_that_is_scored() -> None:
    """Rather the one that needs them, though it came first, gives up its own."""
    bench = Bench(dataclasses.replace(CONFIG, shards=1, num_pages=4, max_batch_tokens=2))
    first, scored = generate("first", [1] * 4, 8), generate("scored", [2] * 8, 0, score_prompt=True)
    bench.add(first)
    bench.add(scored)
    bench.drain()
    assert bench.answers == {"first": expected(first), "scored": expected(scored)}
    names = [bench.request_of([first, scored])[start.sequence].request for start in bench.shards[0].started]
    assert names == ["first", "scored", "first"]


def test_where_nothing_is_preempted_answers_have_their_pages_from_the_beginning() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1, num_pages=6, preemption=False))
    for token, name in enumerate("abc"):
        bench.add(generate(name, [token] * 7, 10))
    bench.add(generate("chat", [7], 1))
    bench.schedule()
    assert bench.scheduler.stats.running == 1
    bench.drain()
    assert bench.scheduler.stats.preemptions == 0
