"""Simulated shards that check every plan they get, and a bench that runs a scheduler on them."""

from __future__ import annotations

import dataclasses
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from flyray.actors.request import Generate, Progress
from flyray.actors.scheduler import Scheduler, SchedulerConfig
from flyray.actors.step_plan import (
    Decodes,
    NewTokens,
    PromptScores,
    Sampling,
    SequenceStart,
    Slice,
    StepPlan,
    StepResult,
)
from flyray.actors.wire import decode, encode

VOCAB = 9
MISSING = "/missing"
CONFIG = SchedulerConfig("kimi", 3, 2, 8, 4, 6, 8, 32, VOCAB, "colocated")


def next_token(tokens: Sequence[int]) -> int:
    """What the simulated model says after these tokens: depends on all of them and their order."""
    return zlib.crc32(bytes(tokens)) % VOCAB


def logprob(tokens: Sequence[int], token: int) -> float:
    """The simulated model's log probability of `token` after `tokens`."""
    return -float(zlib.crc32(bytes([*tokens, 99, token])) % 1000)


def divergence(score: float) -> float:
    """The simulated model's divergence where it gave this score."""
    return score * score


def agrees(score: float) -> bool:
    return int(score) % 2 == 0


def generate(name: str, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 4, **changes: object) -> Generate:
    request = Generate(name, tuple(prompt), max_tokens, Sampling(0.0, 1.0, 0, zlib.crc32(name.encode())), (), 0, False)
    return dataclasses.replace(request, **changes)  # type: ignore[arg-type]


@dataclass
class Answer:
    """What a client has got, or should get. cached_tokens: left out of comparisons that do not name it."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    cached_tokens: int = field(default=0, compare=False)


def expected(request: Generate) -> Answer:
    """The whole answer of the simulated model."""
    answer, tokens = Answer(), list(request.prompt)
    if request.score_prompt:
        if request.compare == MISSING:
            return Answer(finish="error", error=f"{MISSING}: is not there")
        answer.scores = [logprob(tokens[:index], tokens[index]) for index in range(1, len(tokens))]
        if request.compare:
            answer.divergences = [divergence(score) for score in answer.scores]
            answer.agreements = [agrees(score) for score in answer.scores]
    for _ in range(request.max_tokens):
        token = next_token(tokens)
        if token in request.stop_tokens:
            answer.finish = "stop"
            return answer
        answer.tokens.append(token)
        answer.logprobs.append(logprob(tokens, token))
        tokens.append(token)
    answer.finish = "length"
    return answer


@dataclass
class Held:
    """A sequence on a simulated shard; the last of `tokens` may be sampled and not yet run."""

    start: SequenceStart
    tokens: list[int]
    pages: list[int]
    position: int = 0


class SimulatedShard:
    """Runs plans as a shard would, and asserts that each can be run.

    Like a real one it knows of a sequence only what the plans say and what lies in the pages: a token is written with
    all that was before it, and read again by whoever goes on after it. ran: tokens that ran in all.
    """

    def __init__(self, index: int, config: SchedulerConfig, step: int = 0) -> None:
        """step: the number of its first."""
        self.index, self.config = index, config
        self.held: dict[int, Held] = {}
        self.started: list[SequenceStart] = []
        self.step = step
        self.ran = 0
        self.memory: dict[int, tuple[int, ...]] = {}
        self.shared: dict[int, int] = {}
        """Pages that a second sequence has taken, and in which step it first did."""

    def run(self, plan: StepPlan) -> StepResult:
        assert decode(encode(plan)) == plan
        assert (plan.engine, plan.epoch, plan.program) == (self.config.engine, self.config.epoch, self.config.program)
        assert plan.step == self.step
        self.step += 1
        for sequence in plan.ends:
            del self.held[sequence]
        for start in plan.starts:
            assert all(start.sequence != other.sequence for other in self.started)
            self.started.append(start)
            self.held[start.sequence] = Held(start, [], [])
        parts = [*self._decodes(plan.decodes), *plan.slices]
        assert len({part.sequence for part in parts}) == len(parts) == plan.sequences
        assert all(part.tokens for part in plan.slices)
        assert plan.rows == sum(len(part.tokens) or 1 for part in parts) <= self.config.max_batch_tokens
        self.ran += plan.rows
        # As in each layer of the model: all write, then all read.
        for part in parts:
            self._write(self.held[part.sequence], part)
        written = [self._read(self.held[part.sequence]) for part in parts]
        tokens: list[tuple[int, int, float]] = []
        scores: list[PromptScores] = []
        for part, seen in zip(parts, written, strict=True):
            held = self.held[part.sequence]
            if part.tokens and held.start.score_prompt:
                known = seen if part.next_token < 0 else [*seen, part.next_token]
                values = tuple(logprob(known[:index], known[index]) for index in range(part.start + 1, len(known)))
                scores.append(self.scores(held.start, part.start, values))
            if part.sample:
                token = next_token(seen)
                tokens.append((part.sequence, token, logprob(seen, token)))
                held.tokens = [*seen, token]
        news = NewTokens(*zip(*tokens, strict=True)) if tokens else NewTokens()
        return StepResult(plan.engine, plan.epoch, plan.step, self.index, news, tuple(scores), (), "")

    def _decodes(self, decodes: Decodes) -> list[Slice]:
        """Each as a slice of its own without tokens."""
        pages = dict(zip(decodes.page_rows, decodes.new_pages, strict=True))
        rows = enumerate(zip(decodes.sequences, decodes.starts, strict=True))
        return [Slice(number, at, (), (pages[row],) if row in pages else (), True) for row, (number, at) in rows]

    def _write(self, held: Held, part: Slice) -> None:
        """Takes up a slice's pages and writes its tokens, each with all before it in its sequence."""
        size = self.config.page_size
        end = part.start + (len(part.tokens) or 1)
        kept = -(-end // size) - len(part.new_pages)
        cached = part.start - held.position
        if cached:
            assert cached > 0, "nothing runs twice"
            assert part.start % size == 0, "whole pages come from the cache"
            assert 0 <= kept <= held.position // size
            taken = part.new_pages[: part.start // size - kept]
            for page in taken:
                self.shared.setdefault(page, self.step)
            held.tokens = list(self.memory[taken[-1] * size + size - 1])
            assert len(held.tokens) == part.start, "what the cache gives is the beginning of something"
        else:
            taken = ()
            assert kept == len(held.pages), "pages come as they are needed"
        assert all(0 <= page < self.config.num_pages for page in part.new_pages)
        held.pages[kept:] = part.new_pages
        owned = [page for other in self.held.values() for page in other.pages]
        for page in part.new_pages[len(taken) :]:
            assert owned.count(page) == 1, "no page is given to two for writing"
            self.shared.pop(page, None)
        held.tokens.extend(part.tokens)
        assert len(held.tokens) == end
        for place in range(part.start, end):
            page = held.pages[place // size]
            assert self.shared.get(page, self.step) == self.step, "a shared page is not written again"
            self.memory[page * size + place % size] = tuple(held.tokens[: place + 1])
        held.position = end

    def _read(self, held: Held) -> list[int]:
        """What attention sees of a sequence: all its tokens, each written after those before it."""
        size, seen = self.config.page_size, held.tokens
        for place in range(held.position):
            found = self.memory[held.pages[place // size] * size + place % size]
            assert found == tuple(seen[: place + 1]), "a page holds what its sequence wrote, or would have"
        return list(seen)

    def scores(self, start: SequenceStart, first: int, values: tuple[float, ...]) -> PromptScores:
        if start.compare == MISSING:
            return PromptScores(start.sequence, first, values, error=f"{MISSING}: is not there")
        if not start.compare:
            return PromptScores(start.sequence, first, values)
        return PromptScores(start.sequence, first, values, tuple(map(divergence, values)), tuple(map(agrees, values)))


class Bench:
    """A scheduler, its simulated shards, and clients that note what they get."""

    def __init__(self, config: SchedulerConfig = CONFIG) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.shards = [SimulatedShard(index, config) for index in range(config.shards)]
        self.results: deque[list[StepResult]] = deque()
        self.answers: dict[str, Answer] = {}

    def add(self, request: Generate) -> Progress | None:
        self.answers.setdefault(request.request, Answer())
        return self.scheduler.add(request)

    def schedule(self) -> dict[int, StepPlan] | None:
        plans = self.scheduler.schedule()
        if plans is not None:
            assert sorted(plans) == list(range(self.config.shards)), "each shard gets one plan"
            self.results.append([self.shards[index].run(plan) for index, plan in plans.items()])
        return plans

    def complete(self) -> list[Progress]:
        news = list(self.scheduler.complete(self.results.popleft()[::-1]).batch("").news)
        assert len({item.request for item in news}) == len(news)
        for item in news:
            self.note(item)
        return news

    def note(self, item: Progress) -> None:
        answer = self.answers[item.request]
        assert not answer.finish, "nothing follows the end"
        assert item.tokens or item.finish or item.scores, "no empty news"
        answer.tokens.extend(item.tokens)
        answer.logprobs.extend(item.logprobs)
        assert not (answer.scores and item.scores), "scores come once"
        answer.scores.extend(item.scores)
        answer.divergences.extend(item.divergences)
        answer.agreements.extend(item.agreements)
        answer.finish, answer.error = item.finish, item.error
        answer.cached_tokens += item.cached_tokens

    def lose_shards(self) -> None:
        """New shards take the place of the old ones, with what is on its way to them lost."""
        self.results.clear()
        self.config = dataclasses.replace(self.config, epoch=self.config.epoch + 1)
        self.scheduler.restart(self.config.epoch)
        steps = {shard.step for shard in self.shards}
        self.shards = [SimulatedShard(index, self.config, *steps) for index in range(self.config.shards)]

    def drain(self, limit: int = 2000) -> int:
        """Runs until nothing is left, returns the number of steps; nothing may be lost on the way."""
        steps = 0
        while self.results or self.schedule() is not None:
            self.complete()
            steps += 1
            assert steps < limit, "the scheduler does not come to an end"
        total = self.config.num_pages
        stats = self.scheduler.stats
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.free_pages == (total,) * self.config.shards
        assert not any(shard.held for shard in self.shards), "every sequence is ended on its shard"
        return steps

    def request_of(self, requests: Sequence[Generate]) -> dict[int, Generate]:
        """Sequence number -> request, told by the seed."""
        seeds = {request.sampling.seed: request for request in requests}
        return {start.sequence: seeds[start.sampling.seed] for shard in self.shards for start in shard.started}
