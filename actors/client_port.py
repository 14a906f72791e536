"""Where clients reach the router: requests come in, one message a step goes out to each client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import zmq

from .link import CLIENT_QUEUE, LinkPlace, Links
from .request import Cancel, EngineStatus, Generate, Progress, ProgressBatch, StatusQuery
from .step_news import StepNews
from .wire import WireError, decode, encode

# A prompt of 262,144 tokens takes 1.3 MB.
LARGEST_MESSAGE = 16 << 20
# Clients that vanished in the middle of requests and may come back to hear so; the oldest are forgotten.
MOST_ABSENT = 1000

ClientMessage = Generate | Cancel | StatusQuery


class ClientPort:
    """The clients' socket. Used by the router's loop thread alone.

    A client is known by the routing id that it chose. One that is gone, or reads nothing for `CLIENT_QUEUE` steps,
    is given up: `send` says so, and if it comes back it hears that its requests ended.
    """

    def __init__(self, links: Links, place: LinkPlace, engine: str) -> None:
        self.dropped = 0
        self._engine = engine
        self.socket, self.address = links.bind(zmq.ROUTER, place, "clients", CLIENT_QUEUE, LARGEST_MESSAGE)
        self.socket.router_mandatory = True
        self.socket.router_handover = True
        self._absent: dict[bytes, list[Progress]] = {}

    def receive(self) -> Iterator[tuple[bytes, ClientMessage]]:
        """The messages that have come, with who sent them. What is no request is dropped and counted."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = self._decode(frames)
            if message is None:
                self.dropped += 1
                continue
            if frames[0] in self._absent:
                self.send(frames[0], StepNews(items=self._absent.pop(frames[0])))
            yield frames[0], message

    def send(self, client: bytes, news: StepNews) -> bool:
        """Sends a client its news; False if the client is given up."""
        if self._send(client, news.batch(self._engine)):
            return True
        self._absent.setdefault(client, [])
        while len(self._absent) > MOST_ABSENT:
            del self._absent[next(iter(self._absent))]
        return False

    def remember_lost(self, client: bytes, request: str) -> None:
        """Keeps the end of a given-up client's request for when it comes back."""
        error = "the connection to this client was lost, the request was cancelled"
        self._absent.setdefault(client, []).append(Progress.failed(request, error, lost=True))

    def send_status(self, client: bytes, status: EngineStatus) -> None:
        """Answers a status query; a client that is gone needs none."""
        self._send(client, status)

    def _send(self, client: bytes, message: ProgressBatch | EngineStatus) -> bool:
        try:
            self.socket.send_multipart([client, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _decode(self, frames: list[bytes]) -> ClientMessage | None:
        if len(frames) != 2:
            return None
        try:
            message: Any = decode(frames[1])
        except WireError:
            return None
        return message if isinstance(message, ClientMessage) else None
