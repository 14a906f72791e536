"""Requests and answers of an engine in tests."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flyray.actors.engine_config import EngineConfig
from flyray.actors.request import Generate
from flyray.actors.step_plan import Sampling
from flyray.cluster.engine import EngineClient

T = TypeVar("T")

GREEDY = Sampling(0.0, 1.0, 0, 0)
# Nothing in these tests takes so long unless it hangs.
PATIENCE_S = 150.0


@dataclass(frozen=True)
class Answer:
    """All that a request gave; floats are compared to the bit."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    finish: str = ""
    error: str = ""
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


def tiny_config(path: Path, **changes: Any) -> EngineConfig:
    """An engine on the tiny checkpoint, which a lost shard ends."""
    values = {"model_path": str(path), "precision": "w4a8", "kv_pages": 64, "page_size": 8}
    # So long nobody is silent who only waits for a core.
    values |= {"step_timeout_s": 60.0, "silence_s": 60.0, "shard_restarts": 0}
    return EngineConfig(**(values | changes))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Tokens of the tiny vocabulary."""
    return tuple((seed * 71 + 13 * place * (place + seed + 1)) % 256 for place in range(length))


def greedy(name: str, length: int, max_tokens: int = 12, score: bool = False) -> Generate:
    """A greedy request whose prompt follows from its length."""
    return Generate(name, prompt(length), max_tokens, GREEDY, (), 0, score)


async def answer(client: EngineClient, request: Generate) -> Answer:
    """Runs one request to its end."""
    whole = Answer()
    async for news in client.generate(request):
        whole = Answer(
            whole.tokens + news.tokens,
            whole.logprobs + news.logprobs,
            whole.scores + news.scores,
            news.finish,
            news.error,
            whole.top + news.top_logprobs,
        )
    return whole


async def answers(client: EngineClient, requests: Sequence[Generate]) -> dict[str, Answer]:
    """Runs requests at once."""
    found = await asyncio.gather(*(answer(client, request) for request in requests))
    return {request.request: each for request, each in zip(requests, found, strict=True)}


def run(task: Coroutine[Any, Any, T]) -> T:
    """Runs a test's coroutine, which must end."""
    return asyncio.run(asyncio.wait_for(task, PATIENCE_S))


def process_is_gone(pid: int) -> bool:
    """Whether a process has ended; one that waits to be reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
