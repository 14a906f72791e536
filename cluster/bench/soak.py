"""`flyray bench soak`: an engine under random load, every answer of which must be that of the request run alone.

A first engine, with pages for all and nothing shared, runs each of a pool of requests by itself. A second one, with few
pages, is then loaded with them in random order, by no client and by many in turns: prompts begin alike or are the same
and are prefilled in chunks, sequences are preempted, and clients leave in the middle, some with their connection. If it
is asked for, shards are killed, too, and come back. Requests are greedy, or draw with all that sampling knows; tokens,
log probabilities and scores are compared to the bit.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...actors.checkpoint import Checkpoint
from ...actors.engine_config import EngineConfig
from ...actors.expert_state import UNKNOWN, ExpertState
from ...actors.model.config import ModelConfig
from ...actors.request import EngineStatus, Generate
from ..engine import Engine, EngineClient
from ..figures import Figure
from .soak_kills import ShardKills
from .soak_requests import LONGEST, PAGE, RandomRequests

# In pages: what each shard has.
_OF_SHARD = 24
_STREAMS = 24
# About how long as many clients ask; then it is another number of them, now and then one or none.
_WAVE_S = 1.0
_LEAST_REQUESTS = 8
_SILENCE_S = 60.0
_IDLE_S = 30.0
_MANY = 1 << 30


class SoakError(Exception):
    """An answer was not that of the request run alone, or the engine did not come to rest."""


@dataclass(frozen=True)
class SoakSettings:
    """seconds: of the whole soak, a third of which runs the requests alone. answers: it lasts until so many were equal,
    if that takes longer. seed: of all that is random. shards: of the loaded engine. precision, int8_weights,
    int4_weights: as in `EngineConfig`. rebalance_s: how often the loaded engine moves experts, with a redundant one on
    each shard; 0.0: never. kill_s: so many seconds apart, on average, one of its shards is killed; 0.0: never."""

    seconds: float
    answers: int = 0
    seed: int = 0
    shards: int = 2
    precision: str = "auto"
    int8_weights: tuple[str, ...] = ()
    int4_weights: tuple[str, ...] = ()
    rebalance_s: float = 0.0
    kill_s: float = 0.0

    @property
    def cpus(self) -> int:
        """What Ray must have for both engines at once."""
        return self.shards + 1

    def alone(self, path: Path) -> EngineConfig:
        """Pages for the longest request; nothing shared, one at a time."""
        config = replace(self._both(path), name="alone", kv_pages=LONGEST + 1)
        return replace(config, max_sequences=1, prefix_cache=False)

    def loaded(self, path: Path) -> EngineConfig:
        """Too few pages for what may run at once, and steps shorter than many prompts."""
        config = replace(self._both(path), name="loaded", shards=self.shards, kv_pages=_OF_SHARD)
        if self.rebalance_s:
            config = replace(config, redundant_experts=1, rebalance_interval_s=self.rebalance_s)
        if self.kill_s:
            config = replace(config, shard_restarts=_MANY)
        return replace(config, max_batch_tokens=6 * PAGE, max_sequences=16)

    def _both(self, path: Path) -> EngineConfig:
        config = EngineConfig(str(path), precision=self.precision, page_size=PAGE, silence_s=_SILENCE_S)
        return replace(config, int8_weights=self.int8_weights, int4_weights=self.int4_weights)


@dataclass(frozen=True)
class Answer:
    """What a request gave, as in `Progress`; compared to the bit. finish: "" where the client left."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: str = ""
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()
    scores: tuple[float, ...] = ()


@dataclass
class SoakReport:
    """What a soak without a difference has seen. kills: seconds from each kill of a shard until the engine went on."""

    pool: int
    equal: int = 0
    cancelled: int = 0
    tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    experts: ExpertState = UNKNOWN
    kills: tuple[float, ...] = ()

    def lines(self) -> list[str]:
        lines = [
            f"{self.equal} answers of {self.pool} requests were those of the request run alone, {self.tokens} tokens",
            f"{self.cancelled} requests cancelled, {self.preemptions} preemptions",
            f"{self.cached_tokens} of {self.prompt_tokens} prompt tokens from the prefix cache",
            f"{self.experts.moved} experts moved in {self.experts.version} changes, {self.experts.failures} failed",
        ]
        if self.kills:
            middle, longest = sorted(self.kills)[len(self.kills) // 2], max(self.kills)
            lines.append(
                f"shards killed {len(self.kills)} times, back in {middle:.1f} s (median), {longest:.1f} s at most"
            )
        return lines

    def figures(self) -> list[Figure]:
        names = ("equal", "cancelled", "preemptions")
        figures = [Figure(f"soak.{name}", getattr(self, name), "requests") for name in names]
        return [*figures, Figure("soak.tokens", self.tokens, "tokens")]


Run = Callable[[Callable[[], Coroutine[Any, Any, SoakReport]]], SoakReport]
"""Calls a function and runs the coroutine that it gives to its end."""


def soak(path: Path, settings: SoakSettings, say: Callable[[str], None], run: Run) -> SoakReport:
    """Runs in the Ray that is initialized.

    Raises SoakError with the first difference, and what starting an engine raises.
    """
    vocabulary = ModelConfig.from_dict(Checkpoint(path).config).vocab_size
    with Engine(settings.alone(path)) as alone, Engine(settings.loaded(path)) as loaded:

        async def main() -> SoakReport:
            async with EngineClient(alone.address, alone.keys) as one:
                kills = ShardKills(loaded, settings.kill_s, random.Random(settings.seed)) if settings.kill_s else None
                connect = partial(EngineClient, loaded.address, loaded.keys)
                return await Soak(one, connect, vocabulary, settings, kills).run(say)

        return run(main)


class Soak:
    """One soak of two engines that stand. connect: gives a client of the loaded one. kills: of its shards."""

    def __init__(
        self,
        alone: EngineClient,
        connect: Callable[[], EngineClient],
        vocabulary: int,
        settings: SoakSettings,
        kills: ShardKills | None,
    ) -> None:
        self._alone, self._connect, self._settings = alone, connect, settings
        self._random = random.Random(settings.seed)
        self._requests = RandomRequests(self._random, vocabulary)
        self._expected: list[tuple[Generate, Answer]] = []
        self._kills = kills
        self._sent = 0
        self._asking = _STREAMS
        self._turned = asyncio.Condition()

    async def run(self, say: Callable[[str], None]) -> SoakReport:
        """Raises SoakError."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while len(self._expected) < _LEAST_REQUESTS or loop.time() < begin + self._settings.seconds / 3:
            request = self._requests.draw(f"alone-{len(self._expected)}")
            self._expected.append((request, await _answer(self._alone, request)))
        say(f"{len(self._expected)} requests have run alone")
        report = SoakReport(len(self._expected))
        end = max(begin + self._settings.seconds, loop.time() + self._settings.seconds / 3)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._turn(end))
                if self._kills is not None:
                    group.create_task(self._kills.run(end))
                for number in range(_STREAMS):
                    group.create_task(self._stream(number, report, end))
        except* SoakError as errors:
            raise errors.exceptions[0] from None
        async with self._connect() as client:
            status = await _rest(client)
        report.preemptions, report.cached_tokens = status.preemptions, status.cached_tokens
        report.prompt_tokens, report.experts = status.prompt_tokens, status.experts
        report.kills = tuple(self._kills.seconds) if self._kills is not None else ()
        return report

    async def _turn(self, end: float) -> None:
        """Lets another number of clients ask from time to time: all, some, one, none; and all once more at the end."""
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            await asyncio.sleep(min(self._random.expovariate(1 / _WAVE_S), end - loop.time()))
            await self._let_ask(self._random.choice((_STREAMS, self._random.randint(2, _STREAMS), 1, 0)))
        await self._let_ask(_STREAMS)

    async def _let_ask(self, streams: int) -> None:
        async with self._turned:
            self._asking = streams
            self._turned.notify_all()

    async def _stream(self, number: int, report: SoakReport, end: float) -> None:
        """A client after another, each with a request after another; a quarter of these it leaves after some tokens,
        and now and then its connection ends with them."""
        while self._goes_on(report, end):
            async with self._connect() as client:
                stays = True
                while stays and self._goes_on(report, end):
                    async with self._turned:
                        await self._turned.wait_for(lambda: number < self._asking)
                    stays = await self._ask(client, report)

    def _goes_on(self, report: SoakReport, end: float) -> bool:
        return asyncio.get_running_loop().time() < end or report.equal < self._settings.answers

    async def _ask(self, client: EngineClient, report: SoakReport) -> bool:
        """Whether the client stays after one of the requests."""
        request, expected = self._random.choice(self._expected)
        self._sent += 1
        request = replace(request, request=f"loaded-{self._sent}")
        leave_after = self._random.randint(0, 30) if self._random.random() < 0.25 else None
        closes = self._random.random() < 0.25
        answer = await _answer(client, request, leave_after, client.close if closes else None)
        compare(request, expected, answer)
        report.tokens += len(answer.tokens)
        report.cancelled += not answer.finish
        report.equal += bool(answer.finish)
        return bool(answer.finish) or not closes


async def _rest(client: EngineClient) -> EngineStatus:
    """The engine once it runs nothing; all its pages must then be free."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _IDLE_S
    while (status := await client.status(timeout_s=_IDLE_S)).running or status.waiting:
        if loop.time() > end:
            raise SoakError(f"{status.running} requests run and {status.waiting} wait though no client is left")
        await asyncio.sleep(0.05)
    if status.free_pages != status.total_pages:
        raise SoakError(f"{status.free_pages} of {status.total_pages} pages are free though nothing runs")
    return status


async def _answer(
    client: EngineClient,
    request: Generate,
    leave_after: int | None = None,
    leave: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> Answer:
    """The whole answer; or the first tokens, `leave_after` of them or some more, and then the request is cancelled, by
    `leave` first if it is given.

    Raises SoakError when the engine gives an error.
    """
    found = Answer()
    async with aclosing(client.generate(request)) as stream:
        async for news in stream:
            if news.finish == "error":
                raise SoakError(f"{_told(request)} ended with: {news.error}")
            found = Answer(
                found.tokens + news.tokens,
                found.logprobs + news.logprobs,
                news.finish,
                found.tops + news.top_logprobs,
                found.scores + news.scores,
            )
            if news.finish:
                return found
            if leave_after is not None and len(found.tokens) >= leave_after:
                if leave is not None:
                    await leave()
                break
    return found


def compare(request: Generate, expected: Answer, found: Answer) -> None:
    """Raises SoakError unless `found` is `expected`, or its beginning where the client left."""
    here = len(found.tokens) if not found.finish else max(len(expected.tokens), len(found.tokens))
    for place in range(here):
        one = [
            tuple(value for part in parts for value in part[place : place + 1])
            for parts in ((answer.tokens, answer.logprobs, answer.tops) for answer in (expected, found))
        ]
        if one[0] != one[1]:
            raise SoakError(f"{_told(request)}: token {place} and its log probability are {one[1]}, alone {one[0]}")
    if found.finish and found.finish != expected.finish:
        raise SoakError(f"{_told(request)}: ended by {found.finish!r}, alone by {expected.finish!r}")
    if (found.finish or found.scores) and found.scores != expected.scores:
        raise SoakError(f"{_told(request)}: the prompt's log probabilities are not those of the request alone")


def _told(request: Generate) -> str:
    return (
        f"request {request.request} (prompt {list(request.prompt)}, max_tokens {request.max_tokens}, "
        f"{'scored, ' if request.score_prompt else ''}{request.sampling})"
    )
