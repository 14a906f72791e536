"""Runs batch lines as a front runs requests: on whatever engine there is, waiting while there is none."""

from __future__ import annotations

import asyncio
import logging
import uuid

from ..batch.line import Answer, BatchLine
from ..batch.service import respond
from ..chat import ChatService
from ..front.errors import EngineUnavailable, RequestError
from ..front.http import EngineAccess

logger = logging.getLogger(__name__)

MOST_FAILURES = 3
"""How often a line may fail on an engine that is ready afterwards, before that is its answer: the fault is its own."""
_WAIT_S = 0.5
_BUSY = 429


class ServedLines:
    """A `LineRunner` that never gives up for want of an engine."""

    def __init__(self, access: EngineAccess, wait_s: float = _WAIT_S) -> None:
        """wait_s: seconds between looking for an engine and looking again."""
        self._access, self._wait_s = access, wait_s

    async def run(self, line: BatchLine) -> Answer:
        request_id = f"req_{uuid.uuid4().hex}"
        failures = 0
        while True:
            service = await self._service()
            try:
                return Answer(200, request_id, await respond(service, line))
            except EngineUnavailable as error:
                failures += any(view.stage == "ready" for view in await self._access.views())
                if failures == MOST_FAILURES:
                    return Answer(error.status, request_id, error.body())
            except RequestError as error:
                if error.status != _BUSY:
                    return Answer(error.status, request_id, error.body())
            except Exception:  # a fault of ours: it costs this line, not the batch
                logger.exception("line %d, custom_id %r", line.number, line.custom_id)
                error = RequestError("the server failed at this line; its log says more", status=500, code="internal")
                return Answer(error.status, request_id, error.body())
            await asyncio.sleep(self._wait_s)

    async def _service(self) -> ChatService:
        while True:
            try:
                return await self._access.service()
            except EngineUnavailable:
                await asyncio.sleep(self._wait_s)
