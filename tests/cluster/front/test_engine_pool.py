"""A front's pool over engines that come, drain, fail and go: real clients, real sockets, and engines that only wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from flyray.actors.client_port import ClientPort
from flyray.actors.link import LinkPlace, Links
from flyray.actors.request import EngineStatus, Generate, StatusQuery
from flyray.actors.step_plan import Sampling
from flyray.cluster.config import DEMO_MODEL, EnginesSection, ServeSection
from flyray.cluster.engine_client import EngineClient
from flyray.cluster.engine_state import EngineAddress, EngineState
from flyray.cluster.front.engine_pool import EnginePool
from flyray.cluster.front.errors import EngineUnavailable
from flyray.cluster.front.metrics import FrontMetrics
from flyray.cluster.tokenizer import Tokenizer

PATIENCE_S = 100.0
PROMPT = list(range(200))


@dataclass
class StandingEngine:
    """Takes requests and answers how it is, but computes nothing."""

    name: str
    links: Links = field(default_factory=lambda: Links(None))
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._port = ClientPort(self.links, LinkPlace(host="127.0.0.1"), self.name)
        self.status = EngineStatus("", self.name, 1, True, "", 1, 0, 0, 99, 99, 0, 0, 4096, (), ())
        self.address = self._port.address
        address = EngineAddress(self.address, None, 4096, "alike", 16)
        self.state = EngineState(self.name, "ready", "", False, address, (), "", 1, 1, 1.0)

    async def run(self) -> None:
        while True:
            for client, message in self._port.receive():
                if isinstance(message, StatusQuery):
                    self._port.send_status(client, replace(self.status, query=message.query))
                elif isinstance(message, Generate):
                    self.asked.append(message.request)
            await asyncio.sleep(0.002)


@dataclass
class Listed:
    """A roster that a test writes."""

    engines: list[EngineState] = field(default_factory=list)
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    async def states(self) -> Sequence[EngineState]:
        return list(self.engines)

    async def wake(self) -> None:
        self.woken.set()


@asynccontextmanager
async def pooled(
    *engines: StandingEngine, least: int = 1, recovery_timeout_s: float = PATIENCE_S
) -> AsyncIterator[tuple[EnginePool, Listed]]:
    """The pool of these engines, all of which it has met."""
    roster = Listed([engine.state for engine in engines])
    section = ServeSection(engines=EnginesSection(min=least, max=9), recovery_timeout_s=recovery_timeout_s)
    pool = EnginePool(roster, section, Tokenizer(DEMO_MODEL), "demo", FrontMetrics("demo", "front"))
    tasks = [asyncio.ensure_future(run) for run in (pool.run(), *(engine.run() for engine in engines))]
    try:
        await until(pool, lambda stages: set(stages) == {engine.name for engine in engines})
        await until(pool, lambda stages: set(stages.values()) <= {"ready"})
        yield pool, roster
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in engines:
            engine.links.close()


async def until(pool: EnginePool, holds: Callable[[dict[str, str]], bool]) -> None:
    """Waits for what the stages of all engines, by name, are."""
    while not holds({view.name: view.stage for view in await pool.views()}):
        await asyncio.sleep(0.01)


def begin(client: EngineClient, name: str) -> asyncio.Task[None]:
    """A request that runs until the task is cancelled."""

    async def read() -> None:
        request = Generate(name, tuple(PROMPT), 9, Sampling(0.0, 1.0, 0, 0), (), 0, False)
        async for _ in client.generate(request):
            pass

    return asyncio.ensure_future(read())


def test_a_draining_engine_ends_what_it_has_and_gets_nothing_new() -> None:
    async def drain() -> None:
        first, second = StandingEngine("first"), StandingEngine("second")
        async with pooled(first, second) as (pool, roster):
            client = await pool.engine_for(PROMPT)
            assert await pool.engine_for([*PROMPT, 7]) is client, "what is computed there draws"
            task = begin(client, "long")
            drained, other = (first, second) if client.address == first.address else (second, first)
            roster.engines.remove(drained.state)
            await until(pool, lambda stages: stages[drained.name] == "draining")
            for _ in range(5):
                assert (await pool.engine_for(PROMPT)).address == other.address
            assert not task.done()
            task.cancel()
            await until(pool, lambda stages: set(stages) == {other.name})

    asyncio.run(asyncio.wait_for(drain(), PATIENCE_S))


def test_requests_spread_and_one_that_lost_a_request_is_heard_first() -> None:
    async def spread() -> None:
        engines = [StandingEngine(name) for name in ("a", "b")]
        async with pooled(*engines) as (pool, _):
            tasks, clients = [], []
            for number in range(6):
                clients.append(await pool.engine_for([number] * 40))
                tasks.append(begin(clients[-1], f"r{number}"))
                await asyncio.sleep(0)
            assert sorted(clients.count(client) for client in set(clients)) == [3, 3]
            lost = clients[0]
            at_fault = next(engine for engine in engines if engine.address == lost.address)
            at_fault.status = replace(at_fault.status, ready=False, error="it stumbles")
            assert await pool.engine_for(PROMPT, lost) is not lost
            await until(pool, lambda stages: stages[at_fault.name] != "ready")
            at_fault.status = replace(at_fault.status, ready=True, error="")
            await until(pool, lambda stages: stages[at_fault.name] == "ready")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(asyncio.wait_for(spread(), PATIENCE_S))


def test_the_first_request_has_an_engine_started() -> None:
    async def wake() -> None:
        engine = StandingEngine("late")
        async with pooled(least=0) as (pool, roster):
            waiting = asyncio.ensure_future(pool.service())
            await roster.woken.wait()
            assert not waiting.done()
            running = asyncio.ensure_future(engine.run())
            roster.engines = [replace(engine.state, stage="starting", address=None)]
            await until(pool, lambda stages: stages == {"late": "starting"})
            assert not pool.idle()
            roster.engines = [engine.state]
            assert (await waiting).limits.context_length == 4096
            assert (await pool.engine_for(PROMPT)).address == engine.address
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
        engine.links.close()

    asyncio.run(asyncio.wait_for(wake(), PATIENCE_S))


def test_nobody_waits_for_what_does_not_come() -> None:
    async def refuse() -> None:
        async with pooled(least=0, recovery_timeout_s=0.05) as (pool, roster):
            with pytest.raises(EngineUnavailable):
                await pool.service()
            failed = StandingEngine("broken")
            roster.engines = [replace(failed.state, stage="failed", error="no such file", for_good=True, address=None)]
            await until(pool, lambda stages: stages == {"broken": "failed"})
            with pytest.raises(EngineUnavailable, match="no such file"):
                await pool.service()
            failed.links.close()

    asyncio.run(asyncio.wait_for(refuse(), PATIENCE_S))
