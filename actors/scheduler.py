"""Decides what every shard runs each step: continuous batching with chunked prefill. Pure: no clock, no I/O.

The rules:

- A sequence lives on one shard, chosen at admission by load and cached prefix (`admission.place`). Its pages may be
  shared with others that begin alike (`PrefixCache`); what is known already does not run again, but for the prompt's
  last token. Requests that score their prompt share nothing.
- A request is admitted when that shard has pages for its prompt and one more. The prompt's pages are reserved then;
  those of the answer are taken as they are needed. When there is none, the sequence of the lowest priority, then the
  latest, is preempted: it gives its pages back and waits at the place of its arrival, to run again from its prompt and
  what it has generated. Random numbers are functions of (seed, position), so its text goes on unchanged.
- Waiting requests are admitted by priority (0 before 1), then in order of arrival; none overtakes one that does not
  fit yet, so that large requests are not starved by small ones. Where pages or sequences run out, a request preempts
  sequences of lower priorities to be admitted.
- A sequence whose prompt is being scored is not preempted: scores come from one run.
- `max_batch_tokens` bounds the tokens of one shard in one step: the attention, the exchange buffers and hence the
  step's time are a shard's. Decodes take one token each first, the rest goes to prefill chunks by priority, then
  arrival. A shard never holds more sequences than that bound, so while a prefill is waiting at least one token a step
  is left for it.
- Steps may be scheduled ahead: `schedule` can be called before the last step's `complete`. A sequence that turns out
  to have stopped then has one token too many on its way, which is dropped. One that is preempted meanwhile takes the
  tokens that are on their way, and only then waits to be admitted again.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .admission import place
from .live_request import LiveRequest
from .request import Generate, Progress
from .scheduled_shard import ScheduledShard
from .scheduled_step import ScheduledStep, SchedulerError, Work
from .scheduler_config import SchedulerConfig
from .step_news import StepNews
from .step_plan import Decodes, NewTokens, PromptScores, Slice, StepPlan, StepResult

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerError", "SchedulerStats"]


@dataclass(frozen=True)
class SchedulerStats:
    """free_pages: of each shard, the pages that no running sequence holds or has reserved; known ones are among them.

    cached_pages: pages whose content is known, of all shards. Counted since the start: preemptions; prompt_tokens, of
    all prompts that have run, and how many of them came from the prefix cache (cached_tokens).
    """

    running: int
    waiting: int
    free_pages: tuple[int, ...]
    total_pages: int
    cached_pages: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int


class Scheduler:
    """The state of one engine epoch's requests; `add` and `cancel` may come between any two steps."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._shards = [ScheduledShard(config) for _ in range(config.shards)]
        self._live: dict[str, LiveRequest] = {}
        self._waiting: list[LiveRequest] = []
        self._in_flight: deque[ScheduledStep] = deque()
        self._arrivals = self._next_sequence = self._next_step = 0
        self._preemptions = self._prompt_tokens = self._cached_tokens = 0

    @property
    def stats(self) -> SchedulerStats:
        """What runs and what is free now."""
        return SchedulerStats(
            running=len(self._live) - len(self._waiting),
            waiting=len(self._waiting),
            free_pages=tuple(shard.free_pages for shard in self._shards),
            total_pages=self.config.num_pages * self.config.shards,
            cached_pages=sum(shard.cached_pages for shard in self._shards),
            preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
        )

    def add(self, request: Generate) -> Progress | None:
        """Queues a request. One that can never run is not queued: its `Progress` with finish "error" is returned.

        The name must differ from those of all unfinished requests, which a refused one leaves as they are.
        """
        name = request.request
        error = self.config.refusal(request)
        if name in self._live:
            error = f"request: the name {name!r} is taken by an unfinished request"
        if error:
            return Progress.failed(name, error)
        shares = self.config.prefix_cache and not request.score_prompt
        live = self._live[name] = LiveRequest(self._arrivals, request, [*request.prompt, *request.emitted], shares)
        live.told_prompt = bool(request.emitted)
        self._arrivals += 1
        insort(self._waiting, live, key=lambda each: each.rank)
        return None

    def cancel(self, request: str) -> bool:
        """Ends a request in whatever state, without a `Progress`. False if none of that name is unfinished."""
        live = self._live.get(request)
        if live is None:
            return False
        self._finish(live)
        return True

    def fail_all(self, error: str) -> list[Progress]:
        """Ends all requests with this error, the engine's, and forgets steps in flight, whose results must not come."""
        names = list(self._live)
        for name in names:
            self.cancel(name)
        self._in_flight.clear()
        self.clear_cache()  # steps that were to fill its pages may not have run
        return [Progress.failed(name, error, lost=True) for name in names]

    def restart(self, epoch: int) -> None:
        """Shards of a new epoch, which hold nothing yet, run all that waits or ran, from its prompt and what it has
        generated; steps in flight are forgotten, and what pages hold."""
        self.config = replace(self.config, epoch=epoch)
        self._in_flight.clear()
        self._shards = [ScheduledShard(self.config) for _ in self._shards]
        for live in self._live.values():
            live.forget_run()
        self._waiting = sorted(self._live.values(), key=lambda each: each.rank)

    def clear_cache(self) -> None:
        """Forgets what pages hold, as it must when the model changes; nothing may run meanwhile."""
        for shard in self._shards:
            shard.clear_cache()

    def schedule(self, trace: bool = False, placement: int = 0) -> dict[int, StepPlan] | None:
        """The next step's plan for every shard, or None if there is nothing to run and nothing to tell.

        placement: as in `StepPlan`."""
        self._admit()
        every = tuple(self._work(shard) for shard in self._shards)
        runs = any(work.decoding or work.slices for work in every)
        if not runs and not any(shard.ends for shard in self._shards):
            return None
        rows = 0 if any(work.slices for work in every) else max(len(work.decoding) for work in every)
        plans = {index: self._plan(index, work, trace, rows, placement) for index, work in enumerate(every)}
        self._in_flight.append(ScheduledStep(self._next_step, every))
        self._next_step += 1
        return plans

    def complete(self, results: Sequence[StepResult]) -> StepNews:
        """Takes in the results of the oldest step in flight, one of every shard in any order.

        Returns the news of its requests; cancelled ones have none. Raises `SchedulerError`, with nothing changed, if
        the results are not those the plans ask for, or one bears an error (then `fail_all`).
        """
        if not self._in_flight:
            raise SchedulerError("results have come, but no step is in flight")
        step = self._in_flight[0]
        by_shard = step.check(self.config, results)
        self._in_flight.popleft()
        news = StepNews()
        for shard, work in enumerate(step.work):
            self._take_decodes(work, by_shard[shard].tokens, news)
            self._take_slices(work, by_shard[shard], news)
        return news

    def _admit(self) -> None:
        while self._waiting:
            live = self._waiting[0]
            if live.in_flight:  # its last tokens are on their way
                return
            live.extend_keys(self.config.page_size)
            placement = place(live, self._shards, self.config)
            if placement is None:
                return
            del self._waiting[0]
            for victim in placement.victims:
                self._preempt(victim)
            self._shards[placement.shard].admit(live, self._next_sequence, placement.shard)
            self._next_sequence += 1

    def _preempt(self, live: LiveRequest) -> None:
        self._shards[live.shard].remove(live)
        insort(self._waiting, live, key=lambda each: each.rank)
        self._preemptions += 1

    def _work(self, shard: ScheduledShard) -> Work:
        """What a shard runs in the next step: decodes, then prefill chunks as far as the budget goes."""
        decoding, decodes = self._decodes(shard)
        budget = self.config.max_batch_tokens - len(decoding)
        slices = []
        for live in [live for live in shard.running if live.prefilling]:
            if not budget:
                break
            shard.catch_up(live)
            count = min(budget, live.prefill - live.position)
            slices.append((live, shard.take(live, count)))
            budget -= count
        return Work(decoding, decodes, tuple(slices))

    def _decodes(self, shard: ScheduledShard) -> tuple[tuple[LiveRequest, ...], Decodes]:
        """All that decode and have a page, moved on by a token."""
        decoding: list[LiveRequest] = []
        page_rows, new_pages = [], []
        for live in [live for live in shard.running if live.decoding]:
            if not live.running:  # preempted for one before it
                continue
            if shard.needs_page(live):
                if not self._find_page(shard, live):
                    continue
                page_rows.append(len(decoding))
                new_pages.append(shard.add_page(live))
            decoding.append(live)
        starts = tuple([live.position for live in decoding])
        for live in decoding:
            live.position += 1
            live.sampled += 1
            live.in_flight += 1
        numbers = tuple([live.number for live in decoding])
        return tuple(decoding), Decodes(numbers, starts, tuple(page_rows), tuple(new_pages))

    def _find_page(self, shard: ScheduledShard, live: LiveRequest) -> bool:
        """Preempts until the sequence has a page for its next token; False if it is preempted itself, or must wait."""
        while not shard.has_page(live):
            victim = shard.victim(live)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is live:
                return False
        return True

    def _plan(self, index: int, work: Work, trace: bool, decode_rows: int, placement: int) -> StepPlan:
        shard, starts = self._shards[index], []
        for live, _ in work.slices:
            if not live.started:
                live.started = True
                starts.append(live.start)
        ends, shard.ends = tuple(shard.ends), []
        return StepPlan(
            engine=self.config.engine,
            epoch=self.config.epoch,
            step=self._next_step,
            program=self.config.program,
            ends=ends,
            starts=tuple(starts),
            decodes=work.decodes,
            slices=tuple(part for _, part in work.slices),
            trace=trace,
            decode_rows=decode_rows,
            placement=placement,
        )

    def _take_decodes(self, work: Work, tokens: NewTokens, news: StepNews) -> None:
        faults = dict(tokens.faults)
        for row, live in enumerate(work.decoding):
            live.in_flight -= 1
            if live.done:
                continue
            if live.number in faults:
                news.items.append(self._failed(live, faults[live.number]))
                continue
            finish = self._take_token(live, tokens.tokens[row])
            if finish or live.request.sampling.top_logprobs:
                news.items.append(self._told(live, tokens, row, finish))
            else:
                news.add(live.request.request, tokens.tokens[row], tokens.logprobs[row])

    def _take_slices(self, work: Work, result: StepResult, news: StepNews) -> None:
        scores, row = {item.sequence: item for item in result.scores}, len(work.decoding)
        for live, part in work.slices:
            live.in_flight -= 1
            if not live.done:
                progress = self._advance(live, part, result.tokens, row, scores.get(part.sequence))
                if progress is not None:
                    news.items.append(progress)
            row += part.sample

    def _advance(
        self, live: LiveRequest, part: Slice, tokens: NewTokens, row: int, scores: PromptScores | None
    ) -> Progress | None:
        """Takes in what one slice gave, if it is sampled a token in this row; None if there is nothing to tell yet."""
        request, finish = live.request, ""
        if scores is not None and scores.error:
            return self._failed(live, scores.error)
        fault = dict(tokens.faults).get(part.sequence)
        if fault:
            return self._failed(live, fault)
        if scores is not None:
            live.add_scores(scores)
        prompt_ends = not live.told_prompt and part.start + len(part.tokens) == len(request.prompt)
        if part.sample:
            finish = self._take_token(live, tokens.tokens[row])
            news = self._told(live, tokens, row, finish)
        elif prompt_ends and not request.max_tokens:
            self._finish(live)
            news = Progress(request.request, (), (), (), "length", "")
        else:
            return None
        return self._with_prompt(live, news) if prompt_ends else news

    def _failed(self, live: LiveRequest, error: str) -> Progress:
        """Ends one request whose shard says what is wrong with it."""
        self._finish(live)
        return Progress.failed(live.request.request, error)

    def _take_token(self, live: LiveRequest, token: int) -> str:
        """Returns how the request ends with this token, "" if it goes on."""
        finish = live.take(token)
        if live.running:
            self._shards[live.shard].register(live)
        return finish

    def _told(self, live: LiveRequest, tokens: NewTokens, row: int, finish: str) -> Progress:
        """The token of this row as news, which ends the request where it finishes."""
        if finish:
            self._finish(live)
        if finish == "stop":
            return Progress(live.request.request, (), (), (), finish, "")
        top = (tokens.tops[row],) if live.request.sampling.top_logprobs else ()
        new = (tokens.tokens[row],), (tokens.logprobs[row],)
        return Progress(live.request.request, *new, (), finish, "", top_logprobs=top)

    def _with_prompt(self, live: LiveRequest, news: Progress) -> Progress:
        """Adds what is told of the prompt, once."""
        live.told_prompt = True
        self._prompt_tokens += len(live.request.prompt)
        self._cached_tokens += live.cached
        return replace(
            news,
            scores=tuple(live.scores),
            divergences=tuple(live.divergences),
            agreements=tuple(live.agreements),
            cached_tokens=live.cached,
        )

    def _finish(self, live: LiveRequest) -> None:
        live.done = True
        if live.running:
            self._shards[live.shard].remove(live)
        else:
            self._waiting.remove(live)
        del self._live[live.request.request]
