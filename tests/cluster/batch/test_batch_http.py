"""Batch lines over HTTP, against a real server on this machine that is busy, broken, or gone."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from flyray.cluster.batch.http import HttpRunner
from flyray.cluster.batch.job import ServiceLost
from flyray.cluster.batch.line import Answer, BatchLine
from flyray.cluster.held_port import HeldPort

LINE = BatchLine(4, "a", "/v1/completions", {"model": "m", "prompt": "hi"})
ERROR = {"error": {"message": "too busy", "code": "queue_full"}}


@contextmanager
def server(*answers: tuple[int, Any], health: int = 200) -> Iterator[tuple[str, list[Any]]]:
    """Gives the answers in turn, the last one for ever; yields the address and what was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(health, {})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, content = answers[min(len(asked), len(answers) - 1)]
            asked.append((self.path, json.loads(body), self.headers["X-Flyray-Priority"]))
            self._reply(status, content)

        def _reply(self, status: int, content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", "0")
            self.send_header("X-Request-Id", "req-7")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Nobody reads it."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}", asked
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def ask(url: str, patience_s: float = 1.0) -> Answer:
    async def main() -> Answer:
        async with HttpRunner(url, patience_s=patience_s) as runner:
            return await runner.run(LINE)

    return asyncio.run(main())


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_answer_is_passed_on(suffix: str) -> None:
    with server((200, {"id": "x"})) as (url, asked):
        assert ask(url + suffix) == Answer(200, "req-7", {"id": "x"})
    assert asked == [("/v1/completions", {"model": "m", "prompt": "hi"}, "1")]


def test_refusal_is_an_answer_and_not_tried_again() -> None:
    with server((400, ERROR)) as (url, asked):
        assert ask(url) == Answer(400, "req-7", ERROR)
    assert len(asked) == 1


def test_busy_server_is_asked_again() -> None:
    with server((429, ERROR), (200, {"id": "x"})) as (url, asked):
        assert ask(url, patience_s=100.0).body == {"id": "x"}
    assert len(asked) == 2


def test_server_that_stays_unavailable_ends_the_job() -> None:
    with server((503, ERROR), health=503) as (url, _), pytest.raises(ServiceLost, match="refuses requests"):
        ask(url, patience_s=0.1)


def test_healthy_server_that_refuses_one_request_does_not_end_the_job() -> None:
    with server((503, ERROR), health=200) as (url, _):
        assert ask(url, patience_s=0.1) == Answer(503, "req-7", ERROR)


def test_server_that_is_gone_ends_the_job() -> None:
    with HeldPort() as port, pytest.raises(ServiceLost, match=r"127.0.0.1:\d+ cannot be reached .*, for 0 s"):
        ask(f"http://127.0.0.1:{port.number}", patience_s=0.1)


def test_answer_that_is_no_json() -> None:
    with server((502, b"<html>Bad gateway</html>")) as (url, _):
        answer = ask(url)
    assert answer.status == 502
    assert answer.body["error"]["message"].endswith("no JSON object: '<html>Bad gateway</html>'")


def test_address_must_be_one() -> None:
    with pytest.raises(ValueError, match="'localhost:8000' is no address of a server"):
        HttpRunner("localhost:8000")
