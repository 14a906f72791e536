"""An engine of one's own for the length of a job: for batches and evaluations, which need no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ..actors.engine_config import EngineConfig
from .answer_run import NO_LIMIT, ServiceLimits
from .chat import ChatService
from .engine import Engine, EngineClient
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineSession:
    """A running engine, and the ways to use it from this event loop."""

    engine: Engine
    client: EngineClient
    service: ChatService
    tokenizer: Tokenizer

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.service.limits.context_length


@asynccontextmanager
async def engine_session(
    config: EngineConfig, model_name: str, default_max_tokens: int = 0, *, partial_statistics: bool = True
) -> AsyncIterator[EngineSession]:
    """Starts an engine in the Ray that is initialized, and ends it with the context, cancelled or not.

    partial_statistics: whether what it gathered (`EngineConfig.statistics`) is complete also after an exception.

    Raises what `Engine` and `Engine.start` raise.
    """
    tokenizer = Tokenizer(config.model_path)
    engine = await asyncio.to_thread(Engine, config)
    starting = asyncio.ensure_future(asyncio.to_thread(engine.start))
    failed = False
    try:
        await asyncio.shield(starting)
        async with EngineClient(engine.address, engine.keys) as client:
            limits = ServiceLimits(engine.shape.longest_sequence(config), default_max_tokens, NO_LIMIT)
            yield EngineSession(engine, client, ChatService(client, tokenizer, model_name, limits), tokenizer)
    except BaseException:
        failed = True
        raise
    finally:
        await asyncio.wait([starting])  # a thread cannot be cancelled: what it starts must be stopped after it
        if failed and not partial_statistics:
            engine.abandon_statistics()
        await asyncio.to_thread(engine.stop)
