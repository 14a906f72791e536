"""Batch lines take the same fields as requests over HTTP, and their refusals say as much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from flyray.actors.request import EngineStatus, Generate, Progress
from flyray.cluster.batch.line import Answer, BatchLine
from flyray.cluster.batch.service import ServiceRunner
from flyray.cluster.chat import ChatService, ServiceLimits
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.tokenizer import Tokenizer


class Source:
    """Answers every request with the token that its seed names."""

    def __init__(self) -> None:
        self.asked: list[Generate] = []

    async def generate(self, request: Generate) -> AsyncGenerator[Progress, None]:
        self.asked.append(request)
        token = request.sampling.seed
        top = tuple((token + i, -1.0 - i) for i in range(request.sampling.top_logprobs))
        yield Progress(request.request, (token,), (-1.0,), (), "length", "", top_logprobs=(top,))

    async def status(self) -> EngineStatus:
        raise AssertionError("the engine is well")


def answer(source: Source, url: str, **body: Any) -> Answer:
    chats = ChatService(source, Tokenizer(DEMO_MODEL), "m", ServiceLimits(200))
    return asyncio.run(ServiceRunner(chats, source).run(BatchLine(1, "a", url, {"model": "m"} | body)))


def test_a_line_may_ask_for_all_that_a_request_may() -> None:
    source = Source()
    fields = {"n": 2, "seed": 50, "logit_bias": {"7": 1}, "min_p": 0.1, "presence_penalty": 0.5, "min_tokens": 1}
    talk = answer(source, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], **fields)
    text = answer(source, "/v1/completions", prompt="hi", best_of=3, logprobs=2, ignore_eos=True, **fields)
    assert (talk.status, text.status) == (200, 200)
    assert [choice["index"] for choice in talk.body["choices"]] == [0, 1]
    assert [len(choice["logprobs"]["top_logprobs"][0]) for choice in text.body["choices"]] == [2, 2]
    assert [each.sampling.seed for each in source.asked] == [50, 51, 50, 51, 52]
    assert {(each.sampling.logit_bias, each.sampling.min_p, each.priority) for each in source.asked} == {
        (((7, 1.0),), 0.1, 1)
    }


def test_a_refusal_names_the_field_and_its_range() -> None:
    found = answer(Source(), "/v1/completions", prompt="hi", frequency_penalty=3)
    assert found.status == 400
    assert found.body["error"]["param"] == "frequency_penalty"
    assert "must be from -2 to 2" in found.body["error"]["message"]


def test_a_body_that_can_be_read_but_not_written_is_the_lines_own_fault() -> None:
    deep: list[Any] = []
    for _ in range(1000):
        deep = [deep]
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    found = answer(Source(), "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], tools=[tool])
    assert (found.status, found.body["error"]["message"]) == (400, "the body is nested too deeply")
