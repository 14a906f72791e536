"""Load on a server or on an engine: closed loop (so many streams at once) or open loop (so many arrivals a second).

It runs in a process of its own, which imports neither Ray nor torch, so that it measures the server and not itself.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ...actors.request import Generate
from ...actors.step_plan import Sampling
from ..answer_run import TOP_P
from ..engine_client import EngineClient
from ..engine_state import EngineAddress
from .event_connection import EventConnection
from .load_summary import StreamTimes

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# Ids that any byte-pair vocabulary has as ordinary text: above its bytes, below its thousandth merge.
_FIRST_ID, _LAST_ID = 256, 1023
# A server that refuses at once is not asked in a tight loop.
_PAUSE_S = 0.01
_WORDS = ("river", "stone", "seven", "light", "garden", "under", "paper", "music", "north", "table")


class LoadError(Exception):
    """The load cannot be made, or none of its requests was answered; the message says why."""


@dataclass(frozen=True)
class Workload:
    """What every request asks. Prompts are random and all different, so that no cache holds them.

    prompt_tokens: with "chat" so many words, whose tokens are counted by the server. shared_prefix: so many tokens
    stand before those of every prompt, the same in all of a run and others in the next, which `run` numbers.
    temperature: 0 for greedy answers; else tokens are drawn with it and the server's usual top_p.
    """

    model: str
    endpoint: str = "completions"
    prompt_tokens: int = 64
    max_tokens: int = 64
    seed: int = 0
    shared_prefix: int = 0
    run: int = 0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise LoadError(f"endpoint: {self.endpoint!r} is none of {', '.join(ENDPOINTS)}")
        if self.shared_prefix and self.endpoint != "completions":
            raise LoadError("a shared prefix is of exact length: measure it with the endpoint 'completions'")

    def prompt(self, number: int) -> list[int]:
        """The token ids of request `number`."""
        prefix = _tokens(f"{self.seed} prefix {self.run}", self.shared_prefix)
        return prefix + _tokens(f"{self.seed} {number}", self.prompt_tokens)

    def body(self, number: int, max_tokens: int) -> bytes:
        """The JSON body of request `number`."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        body |= {"temperature": self.temperature, "top_p": TOP_P, "seed": number}
        body |= {"stream_options": {"include_usage": True}}
        if self.endpoint == "chat":
            draw = random.Random(f"{self.seed} {number}")
            text = " ".join(draw.choice(_WORDS) for _ in range(self.prompt_tokens))
            return json.dumps(body | {"messages": [{"role": "user", "content": text}]}).encode()
        return json.dumps(body | {"prompt": self.prompt(number)}).encode()


def _tokens(seed: str, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(_FIRST_ID, _LAST_ID) for _ in range(count)]


@dataclass(frozen=True)
class Level:
    """How hard the load is: `concurrency` streams at once, or `rate` arrivals a second, for so many seconds."""

    seconds: float
    concurrency: int = 0
    rate: float = 0.0

    def __post_init__(self) -> None:
        if (self.concurrency > 0) == (self.rate > 0):
            raise LoadError("a level of load is a number of streams or a rate, and one of them")

    @property
    def name(self) -> str:
        """c32, or r2.5."""
        return f"c{self.concurrency}" if self.concurrency else f"r{self.rate:g}"


@dataclass(frozen=True)
class Measured:
    """All requests of one level, and the time in which they were sent."""

    streams: tuple[StreamTimes, ...]
    begin: float
    end: float


class Target(Protocol):
    """What is loaded."""

    async def answer(self, number: int, max_tokens: int) -> StreamTimes:
        """Request `number` of the workload, to its end after so many tokens."""
        ...


class HttpTarget:
    """A server's URL. Connections are kept and used again."""

    def __init__(self, url: str, workload: Workload, api_key: str = "") -> None:
        self._url, self._workload, self._api_key = url, workload, api_key
        self._idle: list[EventConnection] = []
        self._path = ENDPOINTS[workload.endpoint]

    async def __aenter__(self) -> HttpTarget:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()

    async def answer(self, number: int, max_tokens: int) -> StreamTimes:
        connection = None
        while self._idle and connection is None:
            idle = self._idle.pop()
            connection = idle if idle.usable else None
        if connection is None:
            begin = time.perf_counter()
            try:
                connection = await EventConnection.open(self._url, self._api_key)
            except OSError as error:
                return StreamTimes(begin, error=f"no connection: {error.strerror or error}")
        try:
            times = await connection.post(self._path, self._workload.body(number, max_tokens))
        except BaseException:
            connection.close()
            raise
        if connection.usable:
            self._idle.append(connection)
        return times


class EngineTarget:
    """An engine's router, without HTTP: the same prompts as token ids."""

    def __init__(self, address: EngineAddress, workload: Workload) -> None:
        self._client = EngineClient(address.address, address.keys)
        self._workload = workload

    async def __aenter__(self) -> EngineTarget:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def answer(self, number: int, max_tokens: int) -> StreamTimes:
        prompt = tuple(self._workload.prompt(number))
        sampling = Sampling(temperature=self._workload.temperature, top_p=TOP_P, top_k=0, seed=number)
        request = Generate(f"load-{number}", prompt, max_tokens, sampling, (), 0, False)
        sent, arrivals, tokens, cached = time.perf_counter(), [], 0, 0
        async for progress in self._client.generate(request):
            if progress.finish == "error":
                return StreamTimes(sent, error=progress.error)
            arrivals.append(time.perf_counter())
            tokens += len(progress.tokens)
            cached += progress.cached_tokens
        return StreamTimes(sent, tuple(arrivals), tokens, len(prompt), cached)


async def closed_loop(target: Target, level: Level, first: int, max_tokens: int) -> Measured:
    """So many streams at once: each asks again when its answer has come. All answers begun are waited for.

    The first answers are of different lengths, so that from then on the streams do not all begin at the same moment;
    they count as answers like all others.
    """
    numbers = iter(range(first, 1 << 62))
    streams: list[StreamTimes] = []
    begin = time.perf_counter()
    end = begin + level.seconds

    async def ask_on(stream: int) -> None:
        tokens = math.ceil(max_tokens * (stream + 1) / level.concurrency)
        while time.perf_counter() < end:
            streams.append(await target.answer(next(numbers), tokens))
            tokens = max_tokens
            if streams[-1].error:
                await asyncio.sleep(_PAUSE_S)

    await asyncio.gather(*map(ask_on, range(level.concurrency)))
    return Measured(tuple(streams), begin, end)


async def open_loop(target: Target, level: Level, first: int, max_tokens: int, seed: int) -> Measured:
    """Requests at random times (a Poisson process), whether earlier ones are answered or not."""
    draw = random.Random(f"arrivals {seed} {first}")
    begin = time.perf_counter()
    end, due, number = begin + level.seconds, begin + draw.expovariate(level.rate), first
    tasks: list[asyncio.Task[StreamTimes]] = []
    while due < end:
        await asyncio.sleep(max(due - time.perf_counter(), 0.0))
        tasks.append(asyncio.ensure_future(target.answer(number, max_tokens)))
        number += 1
        due += draw.expovariate(level.rate)
    return Measured(tuple(await asyncio.gather(*tasks)), begin, end)


@dataclass(frozen=True)
class LoadTask:
    """One level on one target: what the load's process is given. address: an engine's, else `url` is asked."""

    workload: Workload
    level: Level
    first: int
    url: str = ""
    address: EngineAddress | None = None
    api_key: str = ""

    def run(self) -> Measured:
        """Makes the load in this process."""
        return asyncio.run(self._run())

    async def _run(self) -> Measured:
        workload = replace(self.workload, run=self.first)
        async with AsyncExitStack() as stack:
            target: Target
            if self.address is None:
                target = await stack.enter_async_context(HttpTarget(self.url, workload, self.api_key))
            else:
                target = await stack.enter_async_context(EngineTarget(self.address, workload))
            if self.level.concurrency:
                return await closed_loop(target, self.level, self.first, self.workload.max_tokens)
            return await open_loop(target, self.level, self.first, self.workload.max_tokens, self.workload.seed)


class LoadProcess:
    """The process that makes the load, for any number of tasks one after another."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Callable[[LoadTask], Measured]:
        return lambda task: self._pool.submit(task.run).result()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
