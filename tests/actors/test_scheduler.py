"""The scheduler against simulated shards that check every plan they get."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import pytest
from decode_rows import decodes
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_shards import CONFIG, MISSING, VOCAB, Bench, expected, generate, next_token

from flyray.actors.request import Generate, Progress
from flyray.actors.scheduler import Scheduler, SchedulerConfig, SchedulerError
from flyray.actors.step_plan import Sampling, StepPlan

# What prompts may begin with.
SHARED = tuple(place * place % VOCAB for place in range(16))


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, cancels, steps and results in any order, up to three steps ahead."""

    @initialize(
        shards=st.integers(1, 3),
        num_pages=st.integers(2, 10),
        page_size=st.integers(1, 5),
        max_batch_tokens=st.integers(1, 9),
        max_sequences=st.integers(1, 6),
        prefix_cache=st.booleans(),
        preemption=st.sampled_from((True, True, False)),
    )
    def start(self, **sizes: Any) -> None:
        config = SchedulerConfig(
            engine="kimi", epoch=1, context_length=24, vocab_size=VOCAB, program="colocated", **sizes
        )
        self.bench = Bench(config)
        self.requests: dict[str, Generate] = {}
        self.cancelled: set[str] = set()

    @rule(
        shared=st.integers(0, 16),
        own=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
        max_tokens=st.integers(0, 10),
        stops=st.sets(st.integers(0, VOCAB - 1), max_size=3),
        priority=st.integers(0, 1),
        score=st.booleans(),
        compare=st.sampled_from(("", "/kept", MISSING)),
        penalty=st.sampled_from((0.0, 0.5)),
    )
    def add(self, shared: int, own: list[int], stops: set[int], score: bool, compare: str, **how: Any) -> None:
        name = f"request-{len(self.requests)}"
        prompt, max_tokens, priority = [*SHARED[:shared], *own], how["max_tokens"], how["priority"]
        sampling = Sampling(0.0, 1.0, 0, zlib.crc32(name.encode()), presence_penalty=how["penalty"])
        request = generate(
            name,
            prompt,
            max_tokens or int(not score),
            sampling=sampling,
            stop_tokens=tuple(stops),
            priority=priority,
            score_prompt=score,
        )
        if score:
            request = dataclasses.replace(request, compare=compare)
        self.requests[name] = request
        refused = self.bench.add(request)
        config = self.bench.config
        fits = len(prompt) + request.max_tokens <= config.context_length
        fits = fits and config.pages_for(request) <= config.num_pages
        assert (refused is None) == fits
        if refused is not None:
            self.bench.note(refused)

    @rule(data=st.data())
    def add_the_same_name(self, data: st.DataObject) -> None:
        unfinished = [
            name for name in self.requests if not self.bench.answers[name].finish and name not in self.cancelled
        ]
        if unfinished:
            name = data.draw(st.sampled_from(unfinished))
            refused = self.bench.scheduler.add(generate(name))
            assert refused is not None
            assert (refused.finish, name in refused.error) == ("error", True)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.requests:
            name = data.draw(st.sampled_from(sorted(self.requests)))
            unfinished = not self.bench.answers[name].finish and name not in self.cancelled
            assert self.bench.scheduler.cancel(name) == unfinished
            if unfinished:
                self.cancelled.add(name)

    @precondition(lambda self: len(self.bench.results) < 3)
    @rule()
    def schedule(self) -> None:
        self.bench.schedule()

    @precondition(lambda self: self.bench.results)
    @rule()
    def complete(self) -> None:
        for item in self.bench.complete():
            assert item.request not in self.cancelled

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "bench"):
            return
        stats = self.bench.scheduler.stats
        assert stats.running <= self.bench.config.max_sequences
        assert all(0 <= free <= self.bench.config.num_pages for free in stats.free_pages)
        assert len(self.bench.scheduler._in_flight) == len(self.bench.results)
        assert stats.cached_tokens <= stats.prompt_tokens
        for shard, free in zip(self.bench.scheduler._shards, stats.free_pages, strict=True):
            held = {page for live in shard.running for page in live.pages}
            assert free + len(held) + sum(live.reserved for live in shard.running) == self.bench.config.num_pages

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.drain()
        for name, request in self.requests.items():
            answer = self.bench.answers[name]
            if name in self.cancelled:
                assert answer.finish == ""
            elif answer.finish != "error" or MISSING in answer.error:
                assert answer == expected(request)
        self._check_order()
        self._check_starts()

    def _check_order(self) -> None:
        """Within a priority, requests are admitted as they came, but for those that were preempted."""
        if self.bench.scheduler.stats.preemptions:
            return
        admitted = self.bench.request_of(list(self.requests.values()))
        for priority in (0, 1):
            names = [admitted[number].request for number in sorted(admitted) if admitted[number].priority == priority]
            assert names == sorted(names, key=lambda name: int(name.split("-")[1]))

    def _check_starts(self) -> None:
        """Each time a sequence begins, its shard hears what it has generated before, and all of its text if it must."""
        requests = self.bench.request_of(list(self.requests.values()))
        for start in (start for shard in self.bench.shards for start in shard.started):
            request = requests[start.sequence]
            text = (*request.prompt, *expected(request).tokens[: start.generated])
            assert start.history == (text if request.sampling.penalizes else ())


TestScheduler = SchedulerMachine.TestCase


def test_a_prompt_runs_in_chunks_and_then_decodes() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1))
    bench.add(generate("a", range(8), 3))
    found: list[StepPlan] = []
    while (plans := bench.schedule()) is not None:
        found.append(plans[0])
        bench.complete()
    slices = [(part.start, len(part.tokens), part.new_pages, part.sample) for plan in found for part in plan.slices]
    assert slices == [(0, 6, (0, 1), False), (6, 2, (), True)]
    assert [plan.decodes for plan in found[2:4]] == [decodes((0, 8, (2,))), decodes((0, 9))]
    assert bench.answers["a"] == expected(generate("a", range(8), 3))


def test_decodes_are_not_held_up_by_prefills() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1, num_pages=32, max_batch_tokens=3))
    bench.add(generate("a", [1], 8))
    bench.schedule()
    bench.complete()
    bench.add(generate("b", [1] * 20, 2))
    for _ in range(7):
        plans = bench.schedule()
        assert plans is not None
        assert (len(plans[0].decodes.sequences), [len(part.tokens) for part in plans[0].slices]) == (1, [2])
        bench.complete()
    assert bench.answers["a"].finish == "length"


def test_interactive_requests_go_before_batch() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1, max_sequences=1))
    requests = [generate(f"{priority}-{index}", priority=priority) for index in (0, 1) for priority in (1, 0)]
    for request in requests:
        bench.add(request)
    bench.drain()
    admitted = bench.request_of(requests)
    assert [admitted[number].request for number in sorted(admitted)] == ["0-0", "0-1", "1-0", "1-1"]


def test_an_interactive_prompt_goes_before_an_admitted_batch_prompt() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1))
    bench.add(generate("batch", [1] * 12, 1, priority=1))
    bench.schedule()
    bench.add(generate("chat", [2] * 6, 1))
    plans = bench.schedule()
    assert plans is not None
    assert [(part.sequence, len(part.tokens)) for part in plans[0].slices] == [(1, 6)]


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1))
    requests = [generate("first", [1] * 16, 2), generate("large", [2] * 28, 4), generate("small", [3], 1)]
    for request in requests:
        bench.add(request)
    bench.schedule()
    assert (bench.scheduler.stats.running, bench.scheduler.stats.waiting) == (1, 2)
    bench.drain()
    admitted = bench.request_of(requests)
    assert [admitted[number].request for number in sorted(admitted)] == ["first", "large", "small"]


def test_a_batch_request_does_not_overtake_an_interactive_one() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1))
    requests = [generate("first", [1] * 16, 2), generate("large", [2] * 28, 4), generate("batch", [3], 1, priority=1)]
    for request in requests:
        bench.add(request)
    bench.drain()
    admitted = bench.request_of(requests)
    assert [admitted[number].request for number in sorted(admitted)] == ["first", "large", "batch"]


def test_a_shard_takes_no_more_sequences_than_it_can_decode_in_a_step() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1, max_batch_tokens=2))
    for name in "abc":
        bench.add(generate(name, [1], 4))
    bench.schedule()
    assert (bench.scheduler.stats.running, bench.scheduler.stats.waiting) == (2, 1)
    bench.drain()
    assert all(bench.answers[name] == expected(generate(name, [1], 4)) for name in "abc")


def test_sequences_go_to_the_least_loaded_shard() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=3, num_pages=16))
    for token, length in enumerate((16, 4, 8, 1, 1)):
        bench.add(generate(f"{token}", [token] * length, 1))
    plans = bench.schedule()
    assert plans is not None
    assert [[part.sequence for part in plans[index].slices] for index in range(3)] == [[0], [1, 3, 4], [2]]
    assert bench.scheduler.stats.free_pages == (12, 13, 14)


def test_idle_shards_get_a_plan_too() -> None:
    bench = Bench()
    assert bench.schedule() is None
    bench.add(generate("a"))
    plans = bench.schedule()
    assert plans is not None
    assert (len(plans[0].slices), len(plans[1].slices)) == (1, 0)


def test_scoring_spans_chunks() -> None:
    request = generate("a", [index % VOCAB for index in range(15)], 0, score_prompt=True)
    bench = Bench(dataclasses.replace(CONFIG, shards=1))
    bench.add(request)
    plans = bench.scheduler.schedule(trace=True)
    assert plans is not None
    assert plans[0].trace
    assert (plans[0].slices[0].next_token, plans[0].starts[0].score_prompt) == (6, True)
    bench.results.append([bench.shards[0].run(plans[0])])
    bench.drain()
    answer = bench.answers["a"]
    assert answer == expected(request)
    assert (len(answer.scores), answer.tokens, answer.finish) == (14, [], "length")


def test_a_stop_found_late_drops_the_token_on_its_way() -> None:
    prompt = [1, 2, 3]
    request = generate("a", prompt, 8, stop_tokens=(next_token(prompt),))
    bench = Bench(dataclasses.replace(CONFIG, shards=1))
    bench.add(request)
    assert bench.schedule() is not None
    assert bench.schedule() is not None
    assert [item.finish for item in bench.complete()] == ["stop"]
    assert bench.complete() == []
    plans = bench.schedule()
    assert plans is not None
    assert (plans[0].ends, plans[0].sequences) == ((0,), 0)
    bench.complete()
    assert bench.schedule() is None


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (generate("a", []), "prompt: is empty"),
        (
            generate("a", [1] * 30, 3),
            "prompt: 30 tokens and max_tokens 3 together are 33, more than the context_length",
        ),
        (generate("a", [1] * 20, 5), "prompt: 20 tokens and max_tokens 5 need 6 KV pages of 4 tokens, a shard has 5"),
        (generate("a", [1, VOCAB]), f"prompt: token {VOCAB} is outside the vocabulary of {VOCAB} tokens"),
        (generate("a", stop_tokens=(-1,)), f"stop_tokens: token -1 is outside the vocabulary of {VOCAB} tokens"),
        (generate("a", max_tokens=0), "max_tokens: 0 is below 1"),
        (generate("a", max_tokens=-1, score_prompt=True), "max_tokens: -1 is below 1"),
        (generate("a", priority=2), "priority: 2 is none of (0, 1)"),
        (generate("a", sampling=Sampling(float("nan"), 1.0, 0, 1)), "sampling.temperature: nan"),
        (generate("a", sampling=Sampling(1.0, 0.0, 0, 1)), "sampling.top_p: 0.0"),
        (generate("a", sampling=Sampling(1.0, 1.0, -1, 1)), "sampling.top_k: -1"),
        (generate("a", keep="/kept"), "keep: '/kept' is for score_prompt only"),
        (generate("a", compare="/kept"), "compare: '/kept' is for score_prompt only"),
        (generate("a", compare="kept", score_prompt=True), "compare: 'kept' is not an absolute path"),
        (generate("a", keep="/ke\0pt", score_prompt=True), "keep: '/ke\\x00pt' is no path"),
        (generate("a", keep="/kept", compare="/kept", score_prompt=True), "keep: is the same file as compare, '/kept'"),
    ],
)
def test_requests_that_can_never_run_are_refused(request_: Generate, text: str) -> None:
    scheduler = Scheduler(dataclasses.replace(CONFIG, num_pages=5))
    refused = scheduler.add(request_)
    assert refused is not None
    assert refused == Progress("a", (), (), (), "error", refused.error)
    assert refused.error.startswith(text)
    assert scheduler.schedule() is None


def test_the_largest_request_fits() -> None:
    bench = Bench()
    request = generate("a", [1] * 29, 3)
    assert bench.add(request) is None
    bench.drain()
    assert bench.answers["a"] == expected(request)


def test_fail_all_ends_everything() -> None:
    bench = Bench(dataclasses.replace(CONFIG, max_sequences=1))
    bench.add(generate("a"))
    bench.add(generate("b"))
    bench.schedule()
    assert [(item.request, item.finish, item.error) for item in bench.scheduler.fail_all("shard 1 died")] == [
        ("a", "error", "shard 1 died"),
        ("b", "error", "shard 1 died"),
    ]
    bench.results.clear()
    bench.drain()
    with pytest.raises(SchedulerError, match="no step is in flight"):
        bench.scheduler.complete([])


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens: 0 is below 1"):
        dataclasses.replace(CONFIG, max_batch_tokens=0)
