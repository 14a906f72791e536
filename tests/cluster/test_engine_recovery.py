"""Shards that die come back while requests wait, and nothing that a client hears tells that they were gone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from server_process import until
from tiny_checkpoint import write_tiny
from tiny_engine import GREEDY, Answer, answer, answers, greedy, prompt, run, tiny_config

from flyray.actors.request import Generate
from flyray.actors.step_plan import Sampling
from flyray.cluster.engine import Engine, EngineClient

pytestmark = pytest.mark.usefixtures("local_cluster")

DRAWN = Sampling(1.0, 0.95, 0, 7)
PENALIZED = replace(DRAWN, frequency_penalty=0.5, repetition_penalty=1.2, min_tokens=40, stop_ban=(3,), top_logprobs=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def requests() -> list[Generate]:
    """Of all kinds; the longest run for a second or more, and not all at once."""
    some = [greedy(f"greedy {number}", 10 + number, 300) for number in range(6)]
    some += [Generate(f"drawn {seed}", prompt(9), 250, replace(DRAWN, seed=seed), (), 0, False) for seed in range(3)]
    some += [Generate("penalized", prompt(17), 200, PENALIZED, (3,), 0, False)]
    some += [Generate("scored", prompt(200), 100, GREEDY, (), 1, True)]
    return some


async def with_losses(engine: Engine, *losses: Callable[[Engine], None]) -> dict[str, Answer]:
    """The answers, where these things happen one after another while requests run."""
    async with EngineClient(engine.address, engine.keys, silence_s=60.0) as client:
        waiting = asyncio.create_task(answers(client, requests()))
        for number, loss in enumerate(losses, 1):
            while not (await client.status()).running and not waiting.done():
                await asyncio.sleep(0)
            loss(engine)
            while (await client.status()).recoveries < number:
                assert not engine.error
                await asyncio.sleep(0.01)
        found = await waiting
        status = await client.status()
        assert (status.ready, status.error, status.recovering) == (True, "", "")
        assert status.epoch == engine.router.epoch >= len(losses)
        assert status.free_pages == status.total_pages
        return found


def kill(shard: int) -> Callable[[Engine], None]:
    return lambda engine: os.kill(engine.router.local_pids[shard], signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, Answer]:
    with Engine(tiny_config(checkpoint)) as engine:

        async def ask() -> dict[str, Answer]:
            async with EngineClient(engine.address) as client:
                return {each.request: await answer(client, each) for each in requests()}

        return run(ask())


def test_killed_shards_are_a_pause(checkpoint: Path, alone: dict[str, Answer]) -> None:
    config = tiny_config(checkpoint, shards=2, kv_pages=100, shard_restarts=1, max_batch_tokens=64)
    with Engine(config) as engine:
        pids = engine.router.local_pids
        found = run(with_losses(engine, kill(1), kill(0)))
        assert found == alone
        assert set(pids).isdisjoint(engine.router.local_pids)
        kept = [report.bytes_read == 0 for report in engine.router.reports]
        assert kept == [False, True], "who was not killed last has its weights still"
        kill(1)(engine)
        until(lambda: bool(engine.error), "a shard that is lost too often ends the engine")
        assert "shard 1 was lost 2 times within 300 s; shard_restarts allows 1" in engine.error
        assert "shard 1 is gone" in engine.error
