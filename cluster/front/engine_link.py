"""A front's way to its engine: waits until there is one, watches it, and finds the next one when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ...actors.link import LinkKeys
from ...actors.request import EngineStatus
from ..chat import ChatService, ServiceLimits
from ..engine_client import EngineClient, EngineUnreachable
from ..tokenizer import Tokenizer
from .errors import EngineUnavailable
from .journal import Journal
from .metrics import FrontMetrics, MeteredTokens

logger = logging.getLogger(__name__)

_WATCH_PERIOD_S = 1.0
_RETRY_PERIOD_S = 0.2
_STATUS_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class EngineAddress:
    """Where an engine's router listens. keys: None for Unix sockets. longest_sequence: tokens of prompt and answer.
    answers: what these depend on (`EngineConfig.answers`)."""

    address: str
    keys: LinkKeys | None
    longest_sequence: int
    answers: str


class NoEngineComes(EngineUnavailable):
    """There is no engine, and waiting brings none."""


class EngineLink:
    """`Engines` of one engine after another.

    `find` returns the address of the engine once it is ready, and raises EngineUnavailable with what keeps it from
    being so, NoEngineComes if for good. Until the first one is ready requests are refused; once it is lost they wait
    for the next, `recovery_timeout_s` at most from then on.
    """

    def __init__(
        self,
        find: Callable[[], Awaitable[EngineAddress]],
        tokenizer: Tokenizer,
        model_name: str,
        default_max_tokens: int,
        max_waiting: int,
        recovery_timeout_s: float,
        metrics: FrontMetrics,
    ) -> None:
        self._find = find
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._default_max_tokens = default_max_tokens
        self._max_waiting = max_waiting
        self._recovery_timeout_s = recovery_timeout_s
        self._source = MeteredTokens(Journal(self, metrics.replayed), metrics)
        self._client: EngineClient | None = None
        self._service: ChatService | None = None
        self._absence = EngineUnavailable("the engine is starting")
        self._wait_until = -math.inf  # when waiting for an engine ends, by the event loop's clock
        self._changed = asyncio.Event()
        """Set, and replaced by a new one, whenever `_client` or `_absence` change."""

    def service(self) -> ChatService:
        """The chat service. Raises EngineUnavailable with the reason while there is no engine to wait for."""
        if self._service is None or (self._client is None and not self._waits):
            raise self._unavailable()
        return self._service

    async def engine_for(self, prompt: Sequence[int], lost: EngineClient | None = None) -> EngineClient:
        """See `Engines`."""
        if lost is not None and lost is self._client:
            self._lose(EngineUnavailable("the engine was lost"))
        while self._client is None:
            if not self._waits:
                raise self._unavailable()
            try:
                async with asyncio.timeout_at(self._wait_until):
                    await self._changed.wait()
            except TimeoutError:
                continue
        return self._client

    async def status(self) -> EngineStatus:
        """The engine's own word. Raises EngineUnavailable."""
        client = self._client
        if client is None:
            raise self._unavailable()
        try:
            return await client.status(timeout_s=_STATUS_TIMEOUT_S)
        except EngineUnreachable as error:
            if client is not self._client:
                raise self._unavailable() from None
            raise EngineUnavailable(f"the engine does not answer: {error}") from None

    @property
    def _waits(self) -> bool:
        """Whether an engine may still come in time."""
        return asyncio.get_running_loop().time() < self._wait_until

    async def run(self) -> None:
        """Connects, watches, and connects again, until it is cancelled."""
        while True:
            try:
                found = await self._find()
            except NoEngineComes as error:
                self._wait_until = -math.inf
                await self._stay_away(error)
            except EngineUnavailable as error:
                await self._stay_away(error)
            except Exception as error:  # the replica is gone: requests are told, and the search goes on
                logger.warning("no engine was found", exc_info=True)
                await self._stay_away(EngineUnavailable(f"there is no engine: {type(error).__name__}"))
            else:
                await self._serve(found)

    async def _serve(self, found: EngineAddress) -> None:
        """Lets requests through to one engine until it takes none any more."""
        async with EngineClient(found.address, found.keys, answers=found.answers) as client:
            try:
                await self._check(client)
                self._meet(client, found)
                while self._client is client:
                    await self._changes(_WATCH_PERIOD_S)
                    await self._check(client)
            except EngineUnavailable as error:
                self._absence = error
                if self._client is client:
                    self._lose(error)
                else:
                    await asyncio.sleep(_RETRY_PERIOD_S)

    async def _check(self, client: EngineClient) -> None:
        """Raises EngineUnavailable if the engine takes no requests, or is silent for as long as the client allows."""
        try:
            status = await client.status()
        except EngineUnreachable as error:
            raise EngineUnavailable(f"the engine does not answer: {error}") from None
        if not status.ready:
            raise EngineUnavailable(status.error or "the engine is not ready")

    def _meet(self, client: EngineClient, found: EngineAddress) -> None:
        limits = ServiceLimits(found.longest_sequence, self._default_max_tokens, self._max_waiting)
        if self._service is None or self._service.limits != limits:  # else it goes on counting who waits
            self._service = ChatService(self._source, self._tokenizer, self._model_name, limits)
        self._client = client
        self._tell()

    def _lose(self, why: EngineUnavailable) -> None:
        self._client, self._absence = None, why
        self._wait_until = asyncio.get_running_loop().time() + self._recovery_timeout_s
        self._tell()

    async def _stay_away(self, why: EngineUnavailable) -> None:
        self._absence = why
        self._tell()
        await asyncio.sleep(_RETRY_PERIOD_S)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _changes(self, timeout_s: float) -> None:
        """Waits for a change, or so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def _unavailable(self) -> EngineUnavailable:
        """A new error each time: one that is raised again gathers the tracebacks of all its raisers."""
        return EngineUnavailable(self._absence.message, self._absence.retry_after)
