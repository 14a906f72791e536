"""The journal of a front: what its running requests have been told, from which another engine goes on with them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from ...actors.request import Generate, Progress
from ..engine_client import EngineClient
from .engines import Engines
from .errors import EngineUnavailable

# A request that loses so many engines without a token in between is taken for the reason.
MOST_FRUITLESS = 5


class Journal:
    """A `TokenSource` that outlives engines: who reads from it sees a pause where one is lost, and no token twice.

    What an engine gives depends on prompt, sampling and seed alone, so the next one goes on to the bit. One that
    answers otherwise, or is too small for the request, is an error. A request that is closed is sent to no other.
    """

    def __init__(self, engines: Engines, replayed: Callable[[], None] = lambda: None) -> None:
        """replayed: called whenever a request is sent to the next engine."""
        self._engines, self._replayed = engines, replayed

    async def generate(self, request: Generate) -> AsyncGenerator[Progress, None]:
        """The request's news up to the one with `finish`, which is never `lost`. Raises EngineUnavailable."""
        emitted, fruitless, sent = list(request.emitted), 0, request
        engine = await self._engines.engine_for(request.prompt)
        while True:
            before, error = len(emitted), ""
            async with aclosing(engine.generate(sent)) as news:
                async for progress in news:
                    if progress.lost:
                        error = progress.error
                        break
                    emitted += progress.tokens
                    yield progress if sent is request else replace(progress, request=request.request)
                    if progress.finish:
                        return
            fruitless = 0 if len(emitted) > before else fruitless + 1
            if fruitless == MOST_FRUITLESS:
                raise EngineUnavailable(f"{fruitless} engines were lost one after another, the last because: {error}")
            engine = await self._next(request, engine)
            # Another name: the engine may be the same, and know the first one still.
            sent = replace(request, request=secrets.token_hex(12), emitted=tuple(emitted))
            self._replayed()

    async def _next(self, request: Generate, lost: EngineClient) -> EngineClient:
        engine = await self._engines.engine_for(request.prompt, lost)
        if engine.answers != lost.answers:
            raise EngineUnavailable(
                f"the engine that began this answer is gone, and the one that is there now would go on otherwise: "
                f"{engine.answers}, not {lost.answers}"
            )
        return engine
