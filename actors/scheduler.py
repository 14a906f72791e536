"""Decides what every shard runs each step: continuous batching with chunked prefill. Pure: no clock, no I/O.

The rules:

- A sequence lives on one shard, chosen at admission: the one with the fewest reserved pages, at ties the lowest.
- It is admitted only when that shard can reserve pages for its prompt and all of `max_tokens`; so a running sequence
  never runs out of pages and nothing is ever preempted in this version. Pages are handed over as they are needed.
- Waiting requests are admitted by priority (0 before 1), then in order of arrival; none overtakes one that does not
  fit yet, so that large requests are not starved by small ones.
- `max_batch_tokens` bounds the tokens of one shard in one step: the attention, the exchange buffers and hence the
  step's time are a shard's. Decodes take one token each first, the rest goes to prefill chunks by priority, then
  order of admission. A shard never holds more sequences than that bound, so every decode runs every step, and while a
  prefill is waiting at least one token a step is left for it.
- Steps may be scheduled ahead: `schedule` can be called before the last step's `complete`. A sequence that turns out
  to have stopped then has one token too many on its way, which is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .pages import PageAllocator
from .request import Generate, Progress
from .scheduled_step import Running, ScheduledStep, SchedulerError, Work
from .scheduler_config import PRIORITIES, SchedulerConfig
from .step_plan import NewToken, PromptScores, SequenceStart, Slice, StepPlan, StepResult

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerError", "SchedulerStats"]


@dataclass(frozen=True)
class SchedulerStats:
    """free_pages: for each shard, the pages that no running sequence has reserved."""

    running: int
    waiting: int
    free_pages: tuple[int, ...]
    total_pages: int


@dataclass
class _Shard:
    allocator: PageAllocator
    reserved: int = 0
    running: dict[int, Running] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)


class Scheduler:
    """The state of one engine epoch's requests; `add` and `cancel` may come between any two steps."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._shards = [_Shard(PageAllocator(config.num_pages, config.page_size)) for _ in range(config.shards)]
        self._waiting: dict[int, dict[str, Generate]] = {priority: {} for priority in PRIORITIES}
        self._running: dict[str, Running] = {}
        self._in_flight: deque[ScheduledStep] = deque()
        self._next_sequence = 0
        self._next_step = 0

    @property
    def stats(self) -> SchedulerStats:
        """What runs and what is free now."""
        return SchedulerStats(
            running=len(self._running),
            waiting=sum(map(len, self._waiting.values())),
            free_pages=tuple(self.config.num_pages - shard.reserved for shard in self._shards),
            total_pages=self.config.num_pages * self.config.shards,
        )

    @property
    def steps_in_flight(self) -> int:
        """Steps scheduled and not yet completed."""
        return len(self._in_flight)

    def add(self, request: Generate) -> Progress | None:
        """Queues a request. One that can never run is not queued: its `Progress` with finish "error" is returned.

        The name must differ from those of all unfinished requests, which a refused one leaves as they are.
        """
        name = request.request
        error = self.config.refusal(request)
        if name in self._running or any(name in queue for queue in self._waiting.values()):
            error = f"request: the name {name!r} is taken by an unfinished request"
        if error:
            return Progress(name, (), (), (), "error", error)
        self._waiting[request.priority][name] = request
        return None

    def cancel(self, request: str) -> bool:
        """Ends a request in whatever state, without a `Progress`. False if none of that name is unfinished."""
        if request in self._running:
            self._finish(self._running[request])
            return True
        return any(queue.pop(request, None) is not None for queue in self._waiting.values())

    def fail_all(self, error: str) -> list[Progress]:
        """Ends all requests with this error and forgets the steps in flight, whose results must not come any more."""
        names = [*self._running, *(name for queue in self._waiting.values() for name in queue)]
        for name in names:
            self.cancel(name)
        self._in_flight.clear()
        return [Progress(name, (), (), (), "error", error) for name in names]

    def schedule(self, trace: bool = False) -> dict[int, StepPlan] | None:
        """The next step's plan for every shard, or None if there is nothing to run and nothing to tell."""
        self._admit()
        work = tuple(self._slices(shard) for shard in self._shards)
        if not any(work) and not any(shard.ends for shard in self._shards):
            return None
        plans = {index: self._plan(index, slices, trace) for index, slices in enumerate(work)}
        self._in_flight.append(ScheduledStep(self._next_step, work))
        self._next_step += 1
        return plans

    def complete(self, results: Sequence[StepResult]) -> list[Progress]:
        """Takes in the results of the oldest step in flight, one of every shard in any order.

        Returns the news of its requests in order of admission; cancelled ones have none. Raises `SchedulerError`, with
        nothing changed, if the results are not those the plans ask for, or one bears an error (then `fail_all`).
        """
        if not self._in_flight:
            raise SchedulerError("results have come, but no step is in flight")
        step = self._in_flight[0]
        by_shard = step.check(self.config, results)
        self._in_flight.popleft()
        news: list[tuple[int, Progress]] = []
        for shard, work in enumerate(step.work):
            tokens = {item.sequence: item for item in by_shard[shard].tokens}
            scores = {item.sequence: item for item in by_shard[shard].scores}
            for running, part in work:
                if running.done:
                    continue
                progress = self._advance(running, part, tokens.get(running.number), scores.get(running.number))
                if progress is not None:
                    news.append((running.number, progress))
        return [progress for _, progress in sorted(news, key=lambda item: item[0])]

    def _admit(self) -> None:
        for queue in self._waiting.values():
            while queue:
                request = next(iter(queue.values()))
                pages = self.config.pages_for(request)
                shard = self._place(pages)
                if shard is None:
                    return
                del queue[request.request]
                running = Running(self._next_sequence, request, shard, pages)
                self._next_sequence += 1
                self._running[request.request] = running
                self._shards[shard].reserved += pages
                self._shards[shard].running[running.number] = running

    def _place(self, pages: int) -> int | None:
        """The shard for a sequence of so many pages, or None if it has to wait."""
        if len(self._running) >= self.config.max_sequences:
            return None
        fitting = [
            (shard.reserved, index)
            for index, shard in enumerate(self._shards)
            if shard.reserved + pages <= self.config.num_pages and len(shard.running) < self.config.max_batch_tokens
        ]
        return min(fitting)[1] if fitting else None

    def _slices(self, shard: _Shard) -> Work:
        """What a shard runs in the next step: decodes, then prefill chunks as far as the budget goes."""
        decodes = [running for running in shard.running.values() if running.decoding]
        prefills = [running for running in shard.running.values() if running.prefilling]
        prefills.sort(key=lambda running: (running.request.priority, running.number))
        work = [(running, self._slice(shard, running, 1)) for running in decodes]
        budget = self.config.max_batch_tokens - len(work)
        for running in prefills:
            count = min(budget, len(running.request.prompt) - running.position)
            if count:
                work.append((running, self._slice(shard, running, count)))
            budget -= count
        return tuple(work)

    def _slice(self, shard: _Shard, running: Running, count: int) -> Slice:
        """The sequence's next `count` tokens, with the pages they need; moves the sequence on."""
        start, end, request = running.position, running.position + count, running.request
        missing = shard.allocator.pages_for(end) - len(running.pages)
        new_pages = shard.allocator.allocate(max(missing, 0))
        running.pages.extend(new_pages)
        sample = end >= len(request.prompt) and request.max_tokens > 0
        next_token = request.prompt[end] if request.score_prompt and end < len(request.prompt) else -1
        running.position = end
        running.sampled += sample
        return Slice(running.number, start, request.prompt[start:end], new_pages, sample, next_token)

    def _plan(self, index: int, work: Work, trace: bool) -> StepPlan:
        shard, starts = self._shards[index], []
        for running, _ in work:
            if not running.started:
                running.started = True
                request = running.request
                how = request.sampling, request.score_prompt, request.keep, request.compare
                history = request.prompt if request.sampling.needs_history else ()
                starts.append(SequenceStart(running.number, *how, history=history))
        ends, shard.ends = tuple(shard.ends), []
        return StepPlan(
            engine=self.config.engine,
            epoch=self.config.epoch,
            step=self._next_step,
            program=self.config.program,
            ends=ends,
            starts=tuple(starts),
            slices=tuple(part for _, part in work),
            trace=trace,
        )

    def _advance(
        self, running: Running, part: Slice, token: NewToken | None, scores: PromptScores | None
    ) -> Progress | None:
        """Takes in what one slice gave; None if there is nothing to tell the client yet."""
        request, finish = running.request, ""
        if scores is not None and scores.error:
            self._finish(running)
            return Progress(request.request, (), (), (), "error", scores.error)
        prompt_ends = bool(part.tokens) and part.start + len(part.tokens) == len(request.prompt)
        tokens: tuple[int, ...] = ()
        logprobs: tuple[float, ...] = ()
        if scores is not None:
            running.scores.extend(scores.logprobs)
            running.divergences.extend(scores.divergences)
            running.agreements.extend(scores.agreements)
        if prompt_ends:
            finish = "" if request.max_tokens else "length"
        if token is not None and token.token in request.stop_tokens:
            finish = "stop"
        elif token is not None:
            tokens, logprobs = (token.token,), (token.logprob,)
            running.emitted += 1
            finish = "length" if running.emitted == request.max_tokens else ""
        if finish:
            self._finish(running)
        if not (finish or tokens or (prompt_ends and running.scores)):
            return None
        top = (token.top,) if token is not None and tokens and request.sampling.top_logprobs else ()
        news = Progress(request.request, tokens, logprobs, (), finish, "", top_logprobs=top)
        if not prompt_ends:
            return news
        found = tuple(running.divergences), tuple(running.agreements)
        return replace(news, scores=tuple(running.scores), divergences=found[0], agreements=found[1])

    def _finish(self, running: Running) -> None:
        """Frees all a sequence has. Steps in flight may still write its pages: they run before any later plan does."""
        shard = self._shards[running.shard]
        running.done = True
        shard.allocator.free(running.pages)
        shard.reserved -= running.reserved
        del shard.running[running.number]
        del self._running[running.request.request]
        if running.started:
            shard.ends.append(running.number)
