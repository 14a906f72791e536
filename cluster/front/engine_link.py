"""A front's way to its engine: waits until there is one, watches it, and finds the next one when it is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ...actors.link import LinkKeys
from ...actors.request import EngineStatus
from ..chat import ChatService, ServiceLimits
from ..engine_client import EngineClient, EngineUnreachable
from ..tokenizer import Tokenizer
from .errors import EngineUnavailable
from .metrics import FrontMetrics, MeteredTokens

logger = logging.getLogger(__name__)

_WATCH_PERIOD_S = 1.0
_RETRY_PERIOD_S = 0.2
_STATUS_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class EngineAddress:
    """Where an engine's router listens. keys: None for Unix sockets. longest_sequence: tokens of prompt and answer."""

    address: str
    keys: LinkKeys | None
    longest_sequence: int


class EngineLink:
    """`find` returns the address of the engine once it is ready, and raises what keeps it from being so."""

    def __init__(
        self,
        find: Callable[[], Awaitable[EngineAddress]],
        tokenizer: Tokenizer,
        model_name: str,
        default_max_tokens: int,
        max_waiting: int,
        metrics: FrontMetrics,
    ) -> None:
        self._find = find
        self._metrics = metrics
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._default_max_tokens = default_max_tokens
        self._max_waiting = max_waiting
        self._client: EngineClient | None = None
        self._service: ChatService | None = None
        self._absence = EngineUnavailable("the engine is starting")

    def service(self) -> ChatService:
        """The chat service. Raises EngineUnavailable with the reason while there is no engine that takes requests."""
        if self._service is None:
            raise self._unavailable()
        return self._service

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

    def _unavailable(self) -> EngineUnavailable:
        """A new error each time: one that is raised again gathers the tracebacks of all its raisers."""
        return EngineUnavailable(self._absence.message, self._absence.retry_after)

    async def run(self) -> None:
        """Connects, watches, and connects again, until it is cancelled."""
        while True:
            try:
                found = await self._find()
            except EngineUnavailable as error:
                self._absence = error
                await asyncio.sleep(_RETRY_PERIOD_S)
                continue
            except Exception as error:  # the replica is gone: requests are told, and the search goes on
                self._absence = EngineUnavailable(f"there is no engine: {type(error).__name__}")
                logger.warning("no engine was found", exc_info=True)
                await asyncio.sleep(_RETRY_PERIOD_S)
                continue
            await self._serve(found)

    async def _serve(self, found: EngineAddress) -> None:
        """Lets requests through to one engine until it is no longer ready."""
        async with EngineClient(found.address, found.keys) as client:
            self._client = client
            limits = ServiceLimits(found.longest_sequence, self._default_max_tokens, self._max_waiting)
            source = MeteredTokens(client, self._metrics)
            service = ChatService(source, self._tokenizer, self._model_name, limits)
            try:
                while True:
                    status = await self.status()
                    if not status.ready:
                        raise EngineUnavailable(status.error or "the engine is not ready")
                    self._service = service
                    await asyncio.sleep(_WATCH_PERIOD_S)
            except EngineUnavailable as error:
                self._absence = error
            finally:
                self._service = self._client = None
