"""A client of one engine's router, for fronts, batch jobs and tests: asyncio, many requests at once."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from ..actors.link import CLIENT_QUEUE, LinkKeys, Links
from ..actors.request import Cancel, EngineStatus, Generate, Progress, ProgressBatch, StatusQuery
from ..actors.wire import WireError, decode, encode
from .inbox import Inbox

Message = Generate | Cancel | StatusQuery

logger = logging.getLogger(__name__)


class EngineUnreachable(Exception):
    """The router does not answer."""


class EngineClient:
    """Sends requests to a router and fans its answers out to whoever waits for them.

    Several clients may use one engine, and one client serves any number of tasks of one event loop. It connects at its
    first use. While it waits for anything it asks the router for a sign of life every quarter of `silence_s`; when none
    comes for that long, or the connection is lost and with it what was on its way, all that is waited for ends with an
    error: nothing hangs on a dead engine, and no answer goes on with a piece missing.
    """

    def __init__(
        self, address: str, keys: LinkKeys | None = None, silence_s: float = 4.0, *, answers: str = ""
    ) -> None:
        """address and keys: those of the `Engine`. answers: what its answers depend on (`EngineConfig.answers`)."""
        self.answers = answers
        self.address, self._keys, self._silence_s = address, keys, silence_s
        self._links: Links | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._events: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._requests: dict[str, Inbox] = {}
        self._queries: dict[str, asyncio.Future[EngineStatus]] = {}
        self._heard = 0.0

    @property
    def open_requests(self) -> int:
        """Requests of this client that have not ended."""
        return len(self._requests)

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def generate(self, request: Generate) -> AsyncGenerator[Progress, None]:
        """The request's news up to the one with `finish`. Closing the iterator before that cancels the request.

        An engine that refuses the request gives a Progress with finish "error"; one that fails or cannot be reached
        gives one that is `lost` besides. Raises ValueError if this client has an unfinished request of that name.
        """
        if request.request in self._requests:
            raise ValueError(f"request: {request.request!r} is not finished yet, names must differ")
        news = self._requests[request.request] = Inbox()
        finished = False
        try:
            self._send(request)
            while not finished:
                progress = await news.take()
                finished = bool(progress.finish)
                if finished and self._requests.get(request.request) is news:
                    del self._requests[request.request]
                yield progress
        finally:
            if not finished and self._requests.get(request.request) is news:
                self.cancel(request.request)

    def cancel(self, request: str) -> None:
        """Ends a request that nobody wants any more; whoever iterates over it gets a last Progress with finish "error".
        One that is finished or unknown is left alone."""
        news = self._requests.pop(request, None)
        if news is not None:
            news.put(Progress.failed(request, "the request was cancelled"))
            self._send(Cancel(request))

    async def status(self, trace_steps: int = 0, timeout_s: float | None = None) -> EngineStatus:
        """The engine's state. With `trace_steps` it comes when so many steps have been recorded, at most 1000, and has
        them in `trace`. Raises EngineUnreachable when the router is silent or `timeout_s` is over."""
        query = uuid.uuid4().hex
        answer = self._queries[query] = asyncio.get_running_loop().create_future()
        try:
            self._send(StatusQuery(query, trace_steps))
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise EngineUnreachable(f"{self.address}: no status within {timeout_s:g} s") from None
        finally:
            self._queries.pop(query, None)

    async def close(self) -> None:
        """Ends the connection. What is still waited for ends with an error, and the router forgets this client."""
        for request in list(self._requests):
            self._send(Cancel(request))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._give_up("the client was closed")
        if self._links is not None and self._socket is not None and self._events is not None:
            self._socket.disable_monitor()
            # These, not only what is below them: the event loop must forget their descriptors, or it takes the next
            # socket that gets such a number for one that it watches already, and never hears of it.
            self._events.close()
            self._socket.close(linger=200)
            self._links.close()
            self._links = self._socket = self._events = None

    def _send(self, message: Message) -> None:
        """Queues a message for the router; opens the connection first if there is none."""
        sending: Any = self._connected().send(encode(message))
        sending.add_done_callback(_log_failure)

    def _connected(self) -> zmq.asyncio.Socket:
        if self._socket is None:
            self._links = Links(self._keys)
            identity = uuid.uuid4().hex.encode()  # text, for ZeroMQ keeps names that begin with a zero byte to itself
            told = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
            plain = self._links.connect(zmq.DEALER, self.address, CLIENT_QUEUE, identity, told)
            self._socket = zmq.asyncio.Socket.from_socket(plain)
            loop = asyncio.get_running_loop()
            self._heard = loop.time()
            self._events = zmq.asyncio.Socket.from_socket(plain.get_monitor_socket())
            self._tasks = [
                loop.create_task(self._read(self._socket)),
                loop.create_task(self._watch_connection(plain, self._events)),
                loop.create_task(self._watch()),
            ]
        return self._socket

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._take(await socket.recv())

    async def _watch_connection(self, plain: zmq.Socket, events: zmq.asyncio.Socket) -> None:
        """Gives up when a connection that stood is lost; ZeroMQ makes a new one by itself."""
        stood = False
        while True:
            event = parse_monitor_message(await events.recv_multipart())["event"]
            if event == zmq.EVENT_DISCONNECTED and stood:
                while plain.poll(0):  # what came before the end counts
                    self._take(plain.recv())
                self._give_up(f"the connection to the engine at {self.address} was lost")
            stood = event == zmq.EVENT_HANDSHAKE_SUCCEEDED

    def _take(self, data: bytes) -> None:
        """Hands a message to whom it belongs."""
        self._heard = asyncio.get_running_loop().time()
        try:
            message = decode(data)
        except WireError:
            logger.exception("%s sent what is no message", self.address)
            return
        if isinstance(message, ProgressBatch):
            self._tell_all(message)
        elif isinstance(message, EngineStatus):
            answer = self._queries.get(message.query)
            if answer is not None and not answer.done():
                answer.set_result(message)

    def _tell_all(self, batch: ProgressBatch) -> None:
        for progress in batch.news:
            news = self._requests.get(progress.request)
            if news is not None:
                news.put(progress)
            elif not progress.finish:  # given up, and the router does not know or its Cancel was lost
                self._send(Cancel(progress.request))

    async def _watch(self) -> None:
        """Asks for signs of life while something is waited for, and gives up when there are none."""
        loop = asyncio.get_running_loop()
        period = self._silence_s / 4
        was_waiting = False
        while True:
            asleep = loop.time()
            await asyncio.sleep(period)
            self._heard += max(loop.time() - asleep - period, 0.0)  # while this process stood still it heard nobody
            waiting = bool(self._requests or self._queries)
            if waiting and not was_waiting:
                self._heard = max(self._heard, loop.time() - period)  # silence while idle means nothing
            was_waiting = waiting
            if not waiting:
                continue
            if loop.time() - self._heard > self._silence_s:
                self._give_up(f"the engine at {self.address} does not answer")
            else:
                self._send(StatusQuery("", 0))

    def _give_up(self, error: str) -> None:
        for request, news in self._requests.items():
            news.put(Progress.failed(request, error, lost=True))
        self._requests.clear()
        for answer in self._queries.values():
            if not answer.done():
                answer.set_exception(EngineUnreachable(error))


def _log_failure(sending: asyncio.Future[object]) -> None:
    """The queue for the router is full: the request will end by silence."""
    if not sending.cancelled() and sending.exception() is not None:
        logger.warning("a message to the router was not sent: %s", sending.exception())
