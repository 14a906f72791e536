"""One engine as a front knows it: its client, what it said of itself last, and which prompts were sent there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from ...actors.request import EngineStatus
from ..engine_client import EngineClient, EngineUnreachable
from ..engine_state import EngineAddress
from .engine_choice import Candidate, PrefixMemory

_WATCH_PERIOD_S = 1.0
_RETRY_PERIOD_S = 0.2


class EngineMember:
    """Asks its engine once a second how it is, from `start` on until it is closed.

    ready: it has said so since it last lost a request; one that waits for a shard is not, and keeps its requests.
    listed: whether it may get new requests; one that is not is being drained, or gone. status: its last. error: why it
    is not ready.
    """

    def __init__(self, name: str, address: EngineAddress, on_change: Callable[[], None]) -> None:
        """on_change: called when `ready` changes."""
        self.name, self.address = name, address
        self.client = EngineClient(address.address, address.keys, answers=address.answers)
        self.ready, self.listed = False, True
        self.status: EngineStatus | None = None
        self.error = "it has not been heard yet"
        self._on_change = on_change
        self._open_then = 0
        self._memory = PrefixMemory(0)
        self._doubted = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    @property
    def takes_requests(self) -> bool:
        """Whether it may get a new one."""
        return self.ready and self.listed

    @property
    def load(self) -> int:
        """Requests that run or wait there: of other clients when it was last heard, of this one now."""
        status = self.status
        others = 0 if status is None else max(status.running + status.waiting - self._open_then, 0)
        return others + self.client.open_requests

    def start(self) -> None:
        """Begins to ask."""
        self._watching = asyncio.ensure_future(self._watch())

    def candidate(self, keys: Sequence[bytes]) -> Candidate:
        """What it would cost to send a prompt of these pages there."""
        return Candidate(self.load, self._memory.match(keys) * self.address.page_size)

    def sent(self, keys: Sequence[bytes]) -> None:
        """A prompt of these pages goes there."""
        self._memory.add(keys)

    def lose(self, why: str) -> None:
        """It failed a request: it is asked at once, and gets none before it has answered."""
        self._set_ready(False, why)
        self._doubted.set()

    async def close(self) -> None:
        """Ends the connection; what still runs there is lost."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self.client.close()

    async def ask(self, timeout_s: float | None = None) -> str:
        """Hears how it is now. Returns why it does not answer, within so long or the time that its client allows."""
        try:
            self._hear(await self.client.status(timeout_s=timeout_s))
        except EngineUnreachable as error:
            return f"it does not answer: {error}"
        return ""

    async def _watch(self) -> None:
        while True:
            self._doubted.clear()
            if silence := await self.ask():
                self._set_ready(False, silence)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_PERIOD_S if self.ready else _RETRY_PERIOD_S):
                    await self._doubted.wait()

    def _hear(self, status: EngineStatus) -> None:
        if self.status is None or status.epoch != self.status.epoch:
            self._memory = PrefixMemory(status.total_pages)
        self.status, self._open_then = status, self.client.open_requests
        self._set_ready(status.ready, "" if status.ready else status.error or status.recovering or "it is not ready")

    def _set_ready(self, ready: bool, error: str) -> None:
        changed = ready != self.ready
        self.ready, self.error = ready, error
        if changed:
            self._on_change()
