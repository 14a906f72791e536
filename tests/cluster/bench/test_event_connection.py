"""The load generator's connection: the same answer however its bytes come, and errors by their reason."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.bench.event_connection import EventConnection
from flyray.cluster.bench.load import HttpTarget, Workload
from flyray.cluster.bench.load_summary import StreamTimes
from flyray.cluster.held_port import HeldPort

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 5, "completion_tokens": 9}


def event(body: dict) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def text(word: str) -> bytes:
    return event({"choices": [{"index": 0, "text": word}]})


def delta(**fields: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields}]})


def chunked(events: bytes, borders: list[int]) -> bytes:
    """The events in chunks that end at the borders."""
    cuts = sorted({0, len(events), *(border % len(events) for border in borders)})
    chunks = [events[begin:end] for begin, end in itertools.pairwise(cuts)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


async def answers(pieces: list[bytes]) -> tuple[StreamTimes, bool]:
    """What a connection makes of an answer that comes in these pieces, and whether it can be used again."""
    near, far = socket.socketpair()
    with far:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: EventConnection("test"), sock=near)
        asking = asyncio.ensure_future(connection.post("/v1/completions", b"{}"))
        await asyncio.sleep(0)
        for piece in pieces:
            connection.data_received(piece)
        times = await asking
        usable = connection.usable
        connection.close()
        return times, usable


def given_answer(data: bytes, borders: list[int] = ()) -> tuple[StreamTimes, bool]:
    cuts = sorted({0, len(data), *(border % len(data) for border in borders)})
    pieces = [data[begin:end] for begin, end in itertools.pairwise(cuts)]
    return asyncio.run(answers(pieces))


BORDERS = st.lists(st.integers(0, 1 << 20), max_size=12)


@given(BORDERS, BORDERS)
def test_an_answer_is_the_same_however_its_bytes_come(chunk_borders, packet_borders):
    said = [text("ä"), text(""), text("b"), text("c"), event({"choices": [], "usage": USAGE}), b"data: [DONE]\n\n"]
    times, usable = given_answer(HEAD + chunked(b"".join(said), chunk_borders), packet_borders)
    assert (times.error, len(times.arrivals), times.tokens, times.prompt_tokens) == ("", 3, 9, 5)
    assert list(times.arrivals) == sorted(times.arrivals)
    assert times.ttft > 0
    assert usable


def test_thinking_and_calls_are_pieces_and_a_role_is_none():
    said = [delta(role="assistant", content=""), delta(reasoning_content="hm"), delta(content="a")]
    said += [delta(tool_calls=[{"index": 0}]), delta(), event({"choices": [], "usage": USAGE}), b"data: [DONE]\n\n"]
    assert len(given_answer(HEAD + chunked(b"".join(said), []))[0].arrivals) == 3


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ([text("a"), event({"error": {"message": "shard 1 is gone"}})], "shard 1 is gone"),
        ([text("a")], "the stream ended without an answer"),
        ([text("a"), b"data: [DONE]\n\n"], "the server sent no usage"),
        ([event({"choices": [], "usage": USAGE}), b"data: [DONE]\n\n"], "the stream ended without an answer"),
    ],
)
def test_a_stream_without_a_whole_answer_is_an_error(said, error):
    assert given_answer(HEAD + chunked(b"".join(said), []))[0].error == error


@given(BORDERS)
def test_a_refusal_is_an_error_and_leaves_the_connection_usable(borders):
    body = json.dumps({"error": {"code": "queue_full"}}).encode()
    refusal = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    times, usable = given_answer(refusal, borders)
    assert (times.error, usable) == ("429: queue_full", True)


def test_a_server_that_is_not_there_is_an_error():
    async def ask() -> StreamTimes:
        with HeldPort() as port:
            async with HttpTarget(f"http://127.0.0.1:{port.number}", Workload("m")) as target:
                return await target.answer(0, 4)

    assert asyncio.run(ask()).error.startswith("no connection: ")
