"""The chat service over a source of given tokens: what is asked of the engine, and what becomes of its answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.request import Generate, Progress
from flyray.cluster.chat import ChatService, ServiceLimits
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.front.answers import ChatAnswer
from flyray.cluster.front.errors import EngineUnavailable, RequestError
from flyray.cluster.front.requests import ChatRequest, CompletionRequest, parse
from flyray.cluster.tokenizer import Tokenizer

TOKENIZER = Tokenizer(DEMO_MODEL)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ANSWER = (
    "hm🦙m</think>naïve 🦙 answer STOP<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
    '<|tool_call_argument_begin|>{"a": "ü"}<|tool_call_end|><|tool_calls_section_end|>'
)


class Script:
    """A token source that gives the same pieces of news to every request."""

    def __init__(self, *news: tuple[list[int], str] | str) -> None:
        """news: tokens and finish, or an error's text."""
        self.news = news
        self.asked: list[Generate] = []
        self.closed = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def generate(self, request: Generate) -> AsyncGenerator[Progress, None]:
        self.asked.append(request)
        try:
            await self.gate.wait()
            for item in self.news:
                tokens, finish, error = ([], "error", item) if isinstance(item, str) else (*item, "")
                logprobs = tuple(-0.5 for _ in tokens)
                yield Progress(request.request, tuple(tokens), logprobs, (), finish, error)
        finally:
            self.closed += 1


def service(script: Script, context: int = 200, **limits) -> ChatService:
    return ChatService(script, TOKENIZER, "m", ServiceLimits(context, **limits))


def chat(**fields) -> ChatRequest:
    return parse({"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields, ChatRequest)


def text(**fields) -> CompletionRequest:
    return parse({"model": "m", "prompt": "hi"} | fields, CompletionRequest)


def ids(of: str) -> list[int]:
    return TOKENIZER.encode(of, allow_special=True)


async def gather(chats: ChatService, request: ChatRequest) -> ChatAnswer:
    answer = ChatAnswer()
    async with aclosing(chats.chat(request)) as deltas:
        async for delta in deltas:
            assert not delta.empty
            answer.add(delta)
    return answer


@given(cuts=st.lists(st.integers(0, len(ids(ANSWER)))), stop=st.sampled_from([None, "STOP", "answer", "zzz"]))
def test_an_answer_is_the_same_however_its_tokens_come(cuts, stop):
    tokens = ids(ANSWER)
    borders = [0, *sorted(cuts), len(tokens)]
    news = [(tokens[a:b], "") for a, b in itertools.pairwise(borders)]
    request = chat(tools=[TOOL], stop=stop)
    pieces = asyncio.run(gather(service(Script(*news, ([], "stop"))), request))
    whole = asyncio.run(gather(service(Script((tokens, "stop"))), request))
    assert pieces == whole
    assert whole.reasoning == "hm🦙m"
    if stop in (None, "zzz"):
        assert (whole.content, whole.finish) == ("naïve 🦙 answer STOP", "tool_calls")
        assert whole.tool_calls[0].arguments == '{"a": "ü"}'
    else:
        assert (whole.content, whole.finish) == ("naïve 🦙 answer STOP"[: "naïve 🦙 answer STOP".index(stop)], "stop")


def test_what_the_engine_is_asked():
    async def run() -> list[Generate]:
        script = Script(([], "length"))
        chats = service(script, default_max_tokens=50)
        await chats.chat_response(chat())
        await chats.chat_response(chat(thinking=False, seed=-1, top_k=-1), priority=1)
        await chats.chat_response(chat(temperature=0, top_p=0.5, top_k=7, seed=3, max_tokens=9, ignore_eos=True))
        await chats.completion_response(text())
        return script.asked

    thinking, instant, explicit, plain = asyncio.run(run())
    assert (thinking.sampling.temperature, thinking.sampling.top_p, thinking.sampling.top_k) == (1.0, 0.95, 0)
    assert thinking.stop_tokens == (TOKENIZER.special["<|im_end|>"], TOKENIZER.special["[EOS]"])
    assert (thinking.max_tokens, thinking.priority) == (50, 0)
    assert thinking.prompt[-1] == TOKENIZER.special["<think>"]
    assert (instant.sampling.temperature, instant.sampling.seed, instant.priority) == (0.6, 2**63 - 1, 1)
    assert instant.prompt[-1] == TOKENIZER.special["</think>"]
    assert explicit.sampling.temperature == 0
    assert (explicit.sampling.top_p, explicit.sampling.top_k, explicit.sampling.seed) == (0.5, 7, 3)
    assert (explicit.max_tokens, explicit.stop_tokens) == (9, ())
    assert plain.prompt == tuple(TOKENIZER.encode("hi", allow_special=False))
    assert len({each.request for each in (thinking, instant, explicit, plain)}) == 4
    assert thinking.sampling.seed != plain.sampling.seed


@pytest.mark.parametrize(
    ("request_", "status", "param", "says"),
    [
        (chat(model="x"), 404, "model", "there is no model 'x'; this server has 'm'"),
        (chat(max_tokens=199), 400, "max_tokens", "max_tokens 199 exceed the context of 200 tokens"),
        (chat(messages=[{"role": "user", "content": "a b " * 300}]), 400, "messages", "the context holds 200"),
        (text(prompt=[5, 4096]), 400, "prompt", "'prompt[1]': 4096 is no token; ids are 0 to 4095"),
        (text(prompt=["a", ""]), 400, "prompt[1]", "'prompt[1]' is empty"),
        (text(prompt=["a"] * 1025), 400, "prompt", "1025 answers in one request; at most 1024 may wait"),
    ],
)
def test_refusals_before_the_engine_is_asked(request_, status, param, says):
    script = Script()
    begin = service(script).chat if isinstance(request_, ChatRequest) else service(script).completion
    with pytest.raises(RequestError) as caught:
        begin(request_)
    assert (caught.value.status, caught.value.param) == (status, param)
    assert says in caught.value.message
    assert script.asked == []


def test_a_full_queue_is_refused_until_a_first_token_comes():
    async def run() -> None:
        script = Script((ids("a"), ""), (ids("b"), "stop"))
        script.gate.clear()
        chats = service(script, max_waiting=2)
        waiting = [asyncio.ensure_future(gather(chats, chat())) for _ in range(2)]
        while len(script.asked) < 2:
            await asyncio.sleep(0)
        with pytest.raises(RequestError) as caught:
            chats.chat(chat())
        assert (caught.value.status, caught.value.retry_after) == (429, 1)
        assert "2 requests wait already, of at most 2" in caught.value.message
        script.gate.set()
        await asyncio.gather(*waiting)
        assert (await gather(chats, chat())).finish == "stop"

    asyncio.run(run())


def test_leaving_a_stream_closes_the_engines():
    async def run() -> int:
        script = Script((ids("one"), ""), (ids("two"), ""), (ids("three"), "stop"))
        async with aclosing(service(script).chat(chat())) as deltas:
            await anext(deltas)
        async with aclosing(service(script).completion(text(prompt=["a", "b"]))) as parts:
            await anext(parts)
        return script.closed

    assert asyncio.run(run()) == 3


@pytest.mark.parametrize("request_", [chat(), text(), text(prompt=["a", "b"])])
def test_an_engine_that_fails_is_unavailable(request_):
    async def run() -> None:
        chats = service(Script((ids("one"), ""), "shard 1 is gone"))
        answer = chats.chat_response if isinstance(request_, ChatRequest) else chats.completion_response
        with pytest.raises(EngineUnavailable, match="shard 1 is gone"):
            await answer(request_)

    asyncio.run(run())


@pytest.mark.parametrize("request_", [chat(), text(), text(prompt=["a", "b"])])
def test_a_source_that_breaks_ends_the_answer(request_):
    class Broken:
        async def generate(self, request: Generate) -> AsyncGenerator[Progress, None]:
            yield Progress(request.request, (5,), (-0.5,), (), "", "")
            raise OSError("the source broke")

    async def run() -> None:
        chats = ChatService(Broken(), TOKENIZER, "m", ServiceLimits(200))
        answer = chats.chat_response if isinstance(request_, ChatRequest) else chats.completion_response
        with pytest.raises(OSError, match="the source broke"):
            await asyncio.wait_for(answer(request_), 10)

    asyncio.run(run())


def test_whole_answers_have_openai_form():
    tokens = ids(ANSWER)
    body = asyncio.run(service(Script((tokens, "stop"))).chat_response(chat(tools=[TOOL], logprobs=True)))
    choice = body["choices"][0]
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}}
    assert body["object"] == "chat.completion"
    assert choice["message"]["tool_calls"] == [call]
    assert choice["message"]["reasoning_content"] == "hm🦙m"
    assert choice["finish_reason"] == "tool_calls"
    content = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert content.decode() == choice["message"]["content"] == "naïve 🦙 answer STOP"
    assert body["usage"]["completion_tokens"] == len(tokens)
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(ids("hm🦙m</think>"))
