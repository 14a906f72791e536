"""Kills shards of an engine at random moments, and measures how long it takes them to come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time

from ..engine import Engine, EngineClient

_LOOK_S = 0.02
# So often another one, or the same again, is killed before the first is back.
_TWICE = 0.25
_WITHIN_S = 2.5


class ShardKills:
    """Ends a random shard's process, again and again, `every_s` seconds apart on average, now and then two of them.

    seconds: of each time, from the first kill until the engine went on.
    """

    def __init__(self, engine: Engine, every_s: float, draw: random.Random) -> None:
        """engine: with its shards on this machine."""
        self.seconds: list[float] = []
        self._engine, self._every_s, self._random = engine, every_s, draw

    async def run(self, end: float) -> None:
        """Until `end`, by the event loop's clock; a shard that was killed comes back before that. Raises what waiting
        for the engine raises."""
        loop = asyncio.get_running_loop()
        async with EngineClient(self._engine.address, self._engine.keys, silence_s=60.0) as client:
            while (pause := self._random.expovariate(1 / self._every_s)) < end - loop.time():
                await asyncio.sleep(pause)
                before = (await client.status()).recoveries
                begin = time.monotonic()
                self._kill()
                if self._random.random() < _TWICE:
                    await asyncio.sleep(self._random.uniform(0, _WITHIN_S))
                    self._kill()
                while (await client.status()).recoveries == before and not self._engine.error:
                    await asyncio.sleep(_LOOK_S)
                self.seconds.append(time.monotonic() - begin)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was killed before, and the next one has no place yet
            os.kill(self._random.choice(self._engine.router.local_pids), signal.SIGKILL)
