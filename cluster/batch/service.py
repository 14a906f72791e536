"""Runs batch lines in this process's own chat service, behind all interactive requests."""

from __future__ import annotations

import uuid
from typing import Any, Protocol

from ...actors.request import EngineStatus
from ..chat import ChatService
from ..engine_client import EngineUnreachable
from ..front.errors import EngineUnavailable, RequestError
from ..front.requests import ChatRequest, CompletionRequest, parse
from .job import ServiceLost
from .line import Answer, BatchLine

BATCH_PRIORITY = 1


class StatusSource(Protocol):
    """An engine's client."""

    async def status(self) -> EngineStatus: ...


class ServiceRunner:
    """A `LineRunner` over a `ChatService`; `engine` tells a dead engine from a request that it cannot take."""

    def __init__(self, service: ChatService, engine: StatusSource) -> None:
        self._service = service
        self._engine = engine

    async def run(self, line: BatchLine) -> Answer:
        request_id = f"req_{uuid.uuid4().hex}"
        try:
            return Answer(200, request_id, await respond(self._service, line))
        except EngineUnavailable as error:
            await self._raise_if_dead(error)
            return Answer(error.status, request_id, error.body())
        except RequestError as error:
            return Answer(error.status, request_id, error.body())

    async def _raise_if_dead(self, error: EngineUnavailable) -> None:
        try:
            status = await self._engine.status()
        except EngineUnreachable as silence:
            raise ServiceLost(f"the engine stopped: {silence}") from None
        if not status.ready:
            raise ServiceLost(f"the engine stopped: {status.error or error.message}") from None


async def respond(service: ChatService, line: BatchLine) -> dict[str, Any]:
    """The body of a line's answer. Raises RequestError."""
    try:
        if line.url == "/v1/completions":
            return await service.completion_response(parse(line.body, CompletionRequest), BATCH_PRIORITY)
        return await service.chat_response(parse(line.body, ChatRequest), BATCH_PRIORITY)
    except RecursionError:  # JSON that could just be read, and not be written again
        raise RequestError("the body is nested too deeply", code="invalid_json") from None
    except UnicodeEncodeError:
        raise RequestError("the body has half of a surrogate pair, which is no text", code="invalid_json") from None
