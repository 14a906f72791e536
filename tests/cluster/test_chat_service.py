"""The chat service over a source of given tokens: what is asked of the engine, and what becomes of its answers."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.request import Generate, Progress
from flyray.actors.step_plan import Sampling
from flyray.actors.wire import decode, encode
from flyray.cluster.chat import ChatService, ServiceLimits
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.front.answers import ChatAnswer, ChatDelta, TokenLogprob
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
                best = request.sampling.top_logprobs
                top = tuple(tuple((token + i, -0.5 - i) for i in range(best)) for token in tokens) if best else ()
                cached = 3 if item is self.news[0] else 0
                yield Progress(
                    request.request, tuple(tokens), logprobs, (), finish, error, top_logprobs=top, cached_tokens=cached
                )
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


def test_every_sampling_field_reaches_the_engine():
    async def run() -> list[Generate]:
        script = Script(([], "length"))
        fields = {"min_p": 0.25, "presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.25}
        fields |= {
            "logit_bias": {"9": -3, "4": 2.5},
            "stop_token_ids": [11],
            "min_tokens": 2,
            "max_tokens": 9,
            "seed": 5,
        }
        chats = service(script)
        await chats.chat_response(chat(**fields, logprobs=True, top_logprobs=4))
        await chats.completion_response(text(**fields, logprobs=2, ignore_eos=True))
        await chats.completion_response(text(stop_token_ids=[11]))
        return script.asked

    talk, plain, unbanned = asyncio.run(run())
    ends = tuple(TOKENIZER.special[name] for name in ("<|im_end|>", "[EOS]"))
    bias = ((4, 2.5), (9, -3.0))
    assert talk.sampling == Sampling(1.0, 0.95, 0, 5, 0.25, 1.0, -0.5, 1.25, bias, 2, (*ends, 11), 4)
    assert plain.sampling == Sampling(1.0, 0.95, 0, 5, 0.25, 1.0, -0.5, 1.25, bias, 2, (11,), 2)
    assert (talk.stop_tokens, plain.stop_tokens, unbanned.stop_tokens) == ((*ends, 11), (11,), (*ends, 11))
    assert unbanned.sampling.stop_ban == ()
    assert all(decode(encode(each)) == each for each in (talk, plain, unbanned))


def test_choices_have_seeds_and_streams_of_their_own_and_count_the_prompt_once():
    async def run() -> tuple[list[Generate], list[ChatDelta], dict, dict]:
        script = Script((ids("a</think>b"), ""), (ids("c"), "stop"))
        chats = service(script)
        async with aclosing(chats.chat(chat(n=3, seed=2**63 - 1))) as deltas:
            parts = [delta async for delta in deltas]
        whole = await chats.chat_response(chat(n=3, seed=1))
        texts = await chats.completion_response(text(prompt=["a b", "c"], n=2, seed=7))
        return script.asked, parts, whole, texts

    asked, parts, whole, texts = asyncio.run(run())
    assert [each.sampling.seed for each in asked[:3]] == [2**63 - 1, 0, 1]
    assert sorted(delta.index for delta in parts if delta.finish) == [0, 1, 2]
    assert [(each["index"], each["message"]["content"]) for each in whole["choices"]] == [(i, "bc") for i in range(3)]
    length, count = len(asked[0].prompt), len(ids("a</think>b")) + len(ids("c"))
    assert whole["usage"]["prompt_tokens"] == length
    assert whole["usage"]["completion_tokens"] == 3 * count
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert [each.sampling.seed for each in asked[6:]] == [7, 8, 7, 8]
    assert [each["index"] for each in texts["choices"]] == [0, 1, 2, 3]
    assert texts["usage"]["prompt_tokens"] == len(asked[6].prompt) + len(asked[8].prompt)
    assert texts["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}


def test_best_of_gives_the_most_probable_answers_of_each_prompt():
    class Named(Script):
        async def generate(self, request: Generate) -> AsyncGenerator[Progress, None]:
            number = request.sampling.seed
            token = ids(str(number))
            yield Progress(request.request, (*token,), (-1.0 / (1 + number % 3),) * len(token), (), "length", "")

    async def run() -> dict:
        return await service(Named()).completion_response(text(prompt=["a", "b"], n=2, best_of=4, seed=1))

    body = asyncio.run(run())
    assert [(each["index"], each["text"]) for each in body["choices"]] == [(0, "2"), (1, "1"), (2, "2"), (3, "1")]
    assert body["usage"]["completion_tokens"] == 8


def test_the_most_probable_tokens_are_told_in_openais_forms():
    async def run() -> tuple[dict, dict, dict]:
        chats = service(Script(([*ids("</think>"), 50, 51], "length")))
        talk = await chats.chat_response(chat(logprobs=True, top_logprobs=2))
        many = await chats.completion_response(text(logprobs=2))
        return talk, many, await chats.completion_response(text(logprobs=0))

    talk, many, none = asyncio.run(run())
    entries = talk["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == [TOKENIZER.token_name(50), TOKENIZER.token_name(51)]
    for token, entry in zip((50, 51), entries, strict=True):
        assert entry["top_logprobs"] == [
            {"token": TOKENIZER.token_name(each), "logprob": value, "bytes": list(TOKENIZER.token_bytes(each))}
            for each, value in ((token, -0.5), (token + 1, -1.5))
        ]
    found = many["choices"][0]["logprobs"]["top_logprobs"]
    assert found[1] == {TOKENIZER.token_name(50): -0.5, TOKENIZER.token_name(51): -1.5}
    assert none["choices"][0]["logprobs"]["top_logprobs"] is None


def test_an_impossible_token_has_openais_smallest_log_probability():
    entry = TokenLogprob("a", -math.inf, b"a", top=(TokenLogprob("b", -math.inf, b"b"),))
    assert entry.body()["logprob"] == entry.body()["top_logprobs"][0]["logprob"] == -9999.0
    assert entry.by_text() == {"b": -9999.0, "a": -9999.0}


@pytest.mark.parametrize("kind", [chat, text])
def test_stop_strings_count_only_behind_min_tokens(kind):
    tokens = [*ids("</think>"), *ids("x"), *ids("STOP"), *ids("y"), *ids("STOP"), *ids("z")]
    border = 1 + len(ids("x")) + len(ids("STOP"))

    async def run(min_tokens: int) -> str:
        chats = service(Script((tokens, "stop")))
        request = kind(stop="STOP", min_tokens=min_tokens)
        body = await (chats.chat_response(request) if kind is chat else chats.completion_response(request))
        choice = body["choices"][0]
        return choice["message"]["content"] if kind is chat else choice["text"].removeprefix("</think>")

    assert asyncio.run(run(0)) == "x"
    assert asyncio.run(run(border)) == "xSTOPy"


@pytest.mark.parametrize(
    ("request_", "status", "param", "says"),
    [
        (chat(model="x"), 404, "model", "there is no model 'x'; this server has 'm'"),
        (chat(max_tokens=199), 400, "max_tokens", "max_tokens 199 exceed the context of 200 tokens"),
        (chat(messages=[{"role": "user", "content": "a b " * 300}]), 400, "messages", "the context holds 200"),
        (text(prompt=[5, 4096]), 400, "prompt", "'prompt[1]': 4096 is no token; ids are 0 to 4095"),
        (text(prompt=["a", ""]), 400, "prompt[1]", "'prompt[1]' is empty"),
        (text(logit_bias={"4096": 1}), 400, "logit_bias", "'logit_bias': 4096 is no token; ids are 0 to 4095"),
        (chat(stop_token_ids=[5000]), 400, "stop_token_ids", "'stop_token_ids': 5000 is no token"),
        (chat(min_tokens=200), 400, "min_tokens", "'min_tokens' 200 is more than the"),
        (text(prompt=["a"] * 65, n=16), 400, "prompt", "1040 answers in one request; at most 1024 may wait"),
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
