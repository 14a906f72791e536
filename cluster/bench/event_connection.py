"""An HTTP/1.1 connection that posts a request and notes when each server-sent event of its answer comes.

A load generator shares its machine with what it measures, so this reads an answer in a few microseconds an event: no
tasks, no queues, one callback for each packet. It knows chunked answers, and answers with a length for errors.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any
from urllib.parse import urlsplit

from ..http_chat import bearer
from .load_summary import StreamTimes

_HEAD_END = b"\r\n\r\n"
_EVENT_END = b"\n\n"
_DATA = b"data: "
_DONE = b"[DONE]"


class EventConnection(asyncio.Protocol):
    """One connection, one request at a time. `usable` says whether another request may follow."""

    def __init__(self, host: str, api_key: str = "") -> None:
        """host: for the Host header. api_key: "" for none."""
        self._head = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": host} | bearer(api_key)).items())
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[StreamTimes] | None = None
        self._clear()

    @staticmethod
    async def open(url: str, api_key: str = "") -> EventConnection:
        """A new connection to the server at `url`. Raises OSError, or ValueError for what is no http URL."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is no URL that begins with http://")
        loop = asyncio.get_running_loop()
        port = parts.port or 80
        _, protocol = await loop.create_connection(lambda: EventConnection(parts.netloc, api_key), parts.hostname, port)
        return protocol

    @property
    def usable(self) -> bool:
        return self._transport is not None and self._answer is None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    async def post(self, path: str, body: bytes) -> StreamTimes:
        """Sends a request for a stream with usage and returns its times. A refusal or a loss is one with an `error`."""
        if self._transport is None or self._answer is not None:
            raise RuntimeError("the connection is closed or in use")
        head = f"POST {path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
        self._clear()
        self._answer = asyncio.get_running_loop().create_future()
        self._sent = time.perf_counter()
        self._transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        try:
            return await self._answer
        finally:
            self._answer = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end("the connection was lost")

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._raw += data
        if not self._status and not self._read_head():
            return
        whole = self._read_chunks() if self._chunked else self._read_length()
        if self._status == 200:
            self._read_events(now)
        if whole:
            self._end(self._error or self._refusal())

    def _clear(self) -> None:
        self._raw = b""
        self._body = b""
        self._status = 0
        self._chunked = False
        self._left = 0
        self._sent = 0.0
        self._arrivals: list[float] = []
        self._usage: dict[str, Any] = {}
        self._done = False
        self._error = ""

    def _read_head(self) -> bool:
        """Takes status and framing from the head once it is whole."""
        head, found, rest = self._raw.partition(_HEAD_END)
        if not found:
            return False
        lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        self._status = int(lines[0].split()[1])
        self._chunked = headers.get("transfer-encoding") == "chunked"
        self._left = int(headers.get("content-length", 0))
        self._raw = rest
        return True

    def _read_chunks(self) -> bool:
        """Moves the whole chunks from `_raw` to `_body`; True at the last."""
        raw, at, parts = self._raw, 0, []
        whole = False
        while (line := raw.find(b"\r\n", at)) >= 0:
            size = int(raw[at:line], 16)
            end = line + 2 + size
            if len(raw) < end + 2:
                break
            whole = size == 0
            parts.append(raw[line + 2 : end])
            at = end + 2
            if whole:
                break
        self._raw = raw[at:]
        self._body += b"".join(parts)
        return whole

    def _read_length(self) -> bool:
        self._body += self._raw
        self._left -= len(self._raw)
        self._raw = b""
        return self._left <= 0

    def _read_events(self, now: float) -> None:
        *events, self._body = self._body.split(_EVENT_END)
        for event in events:
            data = event.removeprefix(_DATA)
            if data == _DONE:
                self._done = True
                continue
            chunk = json.loads(data)
            if chunk.get("usage"):
                self._usage = chunk["usage"]
            if "error" in chunk:
                self._error = chunk["error"]["message"]
            elif _has_text(chunk):
                self._arrivals.append(now)

    def _refusal(self) -> str:
        if self._status == 200:
            if not (self._done and self._arrivals):
                return "the stream ended without an answer"
            return "" if self._usage else "the server sent no usage"
        try:
            return f"{self._status}: {json.loads(self._body)['error']['code']}"
        except (ValueError, KeyError, TypeError):
            return f"{self._status}"

    def _end(self, error: str) -> None:
        if self._answer is None or self._answer.done():
            return
        if error:
            self._answer.set_result(StreamTimes(self._sent, error=error))
            return
        usage = self._usage
        tokens, prompt = usage["completion_tokens"], usage["prompt_tokens"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self._answer.set_result(StreamTimes(self._sent, tuple(self._arrivals), tokens, prompt, cached))


def _has_text(chunk: dict[str, Any]) -> bool:
    """Whether a chunk brings a part of the answer, and not only a role, an end or counts."""
    for choice in chunk["choices"]:
        delta = choice.get("delta")
        if delta is None:
            if choice.get("text"):
                return True
        elif delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"):
            return True
    return False
