"""`flyray bench soak`: an engine under random load, every answer of which must be that of the request run alone.

A first engine, with pages for all and nothing shared, runs each of a pool of requests by itself. A second one, with few
pages, is then loaded with them in random order and many at once: prompts begin alike and are prefilled in chunks,
sequences are preempted, and clients leave in the middle.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...actors.checkpoint import Checkpoint
from ...actors.engine_config import EngineConfig
from ...actors.model.config import ModelConfig
from ...actors.request import EngineStatus, Generate
from ...actors.step_plan import Sampling
from ..engine import Engine, EngineClient
from ..figures import Figure

PAGE = 8
# In pages: the longest prompt with its answer, what all prompts of a kind share, and what each shard has.
_LONGEST, _SHARED, _OF_SHARD = 16, 5, 24
_STREAMS = 24
_LEAST_REQUESTS = 8
_SILENCE_S = 60.0
_IDLE_S = 30.0


class SoakError(Exception):
    """An answer was not that of the request run alone, or the engine did not come to rest."""


@dataclass(frozen=True)
class SoakSettings:
    """seconds: of the whole soak, a third of which runs the requests alone. seed: of all that is random. shards: of the
    loaded engine. precision: as in `EngineConfig`."""

    seconds: float
    seed: int = 0
    shards: int = 2
    precision: str = "auto"

    @property
    def cpus(self) -> int:
        """What Ray must have for both engines at once."""
        return self.shards + 1

    def alone(self, path: Path) -> EngineConfig:
        """Pages for the longest request; nothing shared, one at a time."""
        config = EngineConfig(str(path), "alone", self.precision, page_size=PAGE, kv_pages=_LONGEST + 1)
        return replace(config, max_sequences=1, prefix_cache=False, silence_s=_SILENCE_S)

    def loaded(self, path: Path) -> EngineConfig:
        """Too few pages for what may run at once, and steps shorter than many prompts."""
        config = EngineConfig(str(path), "loaded", self.precision, self.shards, page_size=PAGE, kv_pages=_OF_SHARD)
        return replace(config, max_batch_tokens=6 * PAGE, max_sequences=16, silence_s=_SILENCE_S)


@dataclass(frozen=True)
class Answer:
    """What a request gave; log probabilities are compared to the bit."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: str = ""


@dataclass
class SoakReport:
    """What a soak without a difference has seen."""

    pool: int
    equal: int = 0
    cancelled: int = 0
    tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def lines(self) -> list[str]:
        return [
            f"{self.equal} answers of {self.pool} requests were those of the request run alone, {self.tokens} tokens",
            f"{self.cancelled} requests cancelled, {self.preemptions} preemptions",
            f"{self.cached_tokens} of {self.prompt_tokens} prompt tokens from the prefix cache",
        ]

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
            async with (
                EngineClient(alone.address, alone.keys) as one,
                EngineClient(loaded.address, loaded.keys) as many,
            ):
                return await Soak(one, many, vocabulary, settings).run(say)

        return run(main)


class Soak:
    """One soak of two engines that stand."""

    def __init__(self, alone: EngineClient, loaded: EngineClient, vocabulary: int, settings: SoakSettings) -> None:
        self._alone, self._loaded, self._settings = alone, loaded, settings
        self._random = random.Random(settings.seed)
        self._vocabulary = vocabulary
        longest = [self._tokens(_SHARED * PAGE) for _ in range(3)]
        self._beginnings = [tuple(tokens[: self._random.randint(PAGE, len(tokens))]) for tokens in longest]
        self._expected: list[tuple[Generate, Answer]] = []
        self._sent = 0

    async def run(self, say: Callable[[str], None]) -> SoakReport:
        """Raises SoakError."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while len(self._expected) < _LEAST_REQUESTS or loop.time() < begin + self._settings.seconds / 3:
            request = self._request(f"alone-{len(self._expected)}")
            self._expected.append((request, await _answer(self._alone, request)))
        say(f"{len(self._expected)} requests have run alone")
        report = SoakReport(len(self._expected))
        end = max(begin + self._settings.seconds, loop.time() + self._settings.seconds / 3)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_STREAMS):
                    group.create_task(self._stream(report, end))
        except* SoakError as errors:
            raise errors.exceptions[0] from None
        status = await self._rest()
        report.preemptions, report.cached_tokens = status.preemptions, status.cached_tokens
        report.prompt_tokens = status.prompt_tokens
        return report

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._vocabulary) for _ in range(count))

    def _request(self, name: str) -> Generate:
        """Half begin as others do; a quarter draws their tokens, from a seed."""
        beginning = self._random.choice(self._beginnings) if self._random.random() < 0.5 else ()
        room = _LONGEST * PAGE - len(beginning)
        prompt = beginning + self._tokens(self._random.randint(1, room // 2))
        most = self._random.randint(1, _LONGEST * PAGE - len(prompt))
        drawn = self._random.random() < 0.25
        sampling = Sampling(1.0 if drawn else 0.0, 0.95 if drawn else 1.0, 0, self._random.randrange(1 << 31))
        return Generate(name, prompt, most, sampling, self._tokens(1), self._random.randint(0, 1), False)

    async def _stream(self, report: SoakReport, end: float) -> None:
        """One client: a request after another, a quarter of which it leaves after some tokens."""
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            request, expected = self._random.choice(self._expected)
            self._sent += 1
            request = replace(request, request=f"loaded-{self._sent}")
            leave_after = self._random.randint(0, 30) if self._random.random() < 0.25 else None
            answer = await _answer(self._loaded, request, leave_after)
            compare(request, expected, answer)
            report.tokens += len(answer.tokens)
            report.cancelled += not answer.finish
            report.equal += bool(answer.finish)

    async def _rest(self) -> EngineStatus:
        """The loaded engine once it runs nothing; all its pages must then be free."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _IDLE_S
        while (status := await self._loaded.status(timeout_s=_IDLE_S)).running or status.waiting:
            if loop.time() > end:
                raise SoakError(f"{status.running} requests run and {status.waiting} wait though no client is left")
            await asyncio.sleep(0.05)
        if status.free_pages != status.total_pages:
            raise SoakError(f"{status.free_pages} of {status.total_pages} pages are free though nothing runs")
        return status


async def _answer(client: EngineClient, request: Generate, leave_after: int | None = None) -> Answer:
    """The whole answer; or the first tokens, `leave_after` of them or some more, and then the request is cancelled.

    Raises SoakError when the engine gives an error.
    """
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    async with aclosing(client.generate(request)) as stream:
        async for news in stream:
            if news.finish == "error":
                raise SoakError(f"{_told(request)} ended with: {news.error}")
            tokens, logprobs = tokens + news.tokens, logprobs + news.logprobs
            if news.finish:
                return Answer(tokens, logprobs, news.finish)
            if leave_after is not None and len(tokens) >= leave_after:
                break
    return Answer(tokens, logprobs)


def compare(request: Generate, expected: Answer, found: Answer) -> None:
    """Raises SoakError unless `found` is `expected`, or its beginning where the client left."""
    here = len(found.tokens) if not found.finish else max(len(expected.tokens), len(found.tokens))
    for place in range(here):
        one = [(*answer.tokens[place : place + 1], *answer.logprobs[place : place + 1]) for answer in (expected, found)]
        if one[0] != one[1]:
            raise SoakError(f"{_told(request)}: token {place} and its log probability are {one[1]}, alone {one[0]}")
    if found.finish and found.finish != expected.finish:
        raise SoakError(f"{_told(request)}: ended by {found.finish!r}, alone by {expected.finish!r}")


def _told(request: Generate) -> str:
    return (
        f"request {request.request} (prompt {list(request.prompt)}, max_tokens {request.max_tokens}, "
        f"temperature {request.sampling.temperature:g}, seed {request.sampling.seed})"
    )
