"""Chat and text completions without a transport: HTTP, batch jobs and evaluations use this one service.

Request in, checked; prompt rendered and tokenized; tokens from the engine; text, thinking, tool calls and counts out.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ..actors.request import Generate, Progress
from ..actors.step_plan import Sampling
from .chat_template import Message, ToolCall, render_pieces
from .front.answers import AnswerHead, ChatAnswer, ChatDelta, TextDelta, TokenLogprob, Usage, text_choice
from .front.errors import EngineUnavailable, RequestError
from .front.queue_clock import QueueClock
from .front.reasoning import AnswerDelta, AnswerParser
from .front.requests import ChatMessage, ChatRequest, CompletionRequest
from .front.stops import StopStrings
from .front.tools import ToolCallDelta
from .tokenizer import Detokenizer, Tokenizer

# Kimi-K2.5's recommended sampling.
THINKING_TEMPERATURE = 1.0
INSTANT_TEMPERATURE = 0.6
TOP_P = 0.95

END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "[EOS]"
# Characters; encoding takes 90 ms a million, and the tokenizer lets other threads run meanwhile.
LONG_TEXT = 16_384


class TokenSource(Protocol):
    """Where tokens come from: an `EngineClient`. Closing the generator cancels the request."""

    def generate(self, request: Generate) -> AsyncGenerator[Progress, None]: ...


@dataclass(frozen=True)
class ServiceLimits:
    """context_length: most tokens of a prompt and its answer. default_max_tokens: of an answer when the request says
    nothing; 0: what the context leaves. max_waiting: requests that wait for their first token; more are refused."""

    context_length: int
    default_max_tokens: int = 0
    max_waiting: int = 1024


@dataclass(frozen=True)
class _Run:
    """A checked request on its way to the engine."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]


class ChatService:
    """Serves one model through one engine's client.

    Methods that begin an answer raise RequestError at once for what is wrong with the request, and EngineUnavailable
    for what is wrong with the engine, the latter also in the middle of an answer. Leaving a stream cancels its request.
    """

    def __init__(self, client: TokenSource, tokenizer: Tokenizer, model_name: str, limits: ServiceLimits) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self.model_name = model_name
        self.limits = limits
        self._end_tokens = (tokenizer.special[END_OF_TURN], tokenizer.special[END_OF_TEXT])
        self._waiting = 0
        self._queue_clock = QueueClock()

    def chat(self, request: ChatRequest, priority: int = 0) -> AsyncGenerator[ChatDelta, None]:
        """The answer as it comes. Checks the request before it returns; `priority` as in `Generate`."""
        self._check_model(request.model)
        self._check_room(1)
        tools = request.offered_tools
        pieces = render_pieces([_message(m) for m in request.messages], tools, request.thinks)
        prompt = self._tokenizer.encode_prompt(pieces)
        temperature = THINKING_TEMPERATURE if request.thinks else INSTANT_TEMPERATURE
        run = self._run(request, prompt, "messages", temperature)
        parser = AnswerParser(self._tokenizer, thinking=request.thinks, tools=bool(tools), stops=request.stop)
        return self._chat(run, parser, bool(request.logprobs), priority)

    async def begin_chat(self, request: ChatRequest, priority: int = 0) -> AsyncGenerator[ChatDelta, None]:
        """As `chat`, with a long text encoded in a thread, so that other answers go on meanwhile."""
        if sum(len(message.content or "") for message in request.messages) < LONG_TEXT:
            return self.chat(request, priority)
        return await asyncio.to_thread(self.chat, request, priority)

    async def chat_response(self, request: ChatRequest, priority: int = 0) -> dict[str, Any]:
        """The whole answer as a "chat.completion" object."""
        head = AnswerHead.new("chatcmpl", self.model_name)
        answer = ChatAnswer()
        async with aclosing(await self.begin_chat(request, priority)) as deltas:
            async for delta in deltas:
                answer.add(delta)
        return answer.body(head, bool(request.logprobs))

    def completion(self, request: CompletionRequest, priority: int = 0) -> AsyncGenerator[TextDelta, None]:
        """The continuations of all prompts as they come. Checks the request before it returns."""
        self._check_model(request.model)
        self._check_room(len(request.prompts))
        runs = []
        for index, prompt in enumerate(request.prompts):
            where = "prompt" if len(request.prompts) == 1 else f"prompt[{index}]"
            runs.append(self._run(request, self._prompt_ids(prompt, where), where, THINKING_TEMPERATURE))
        return self._completions(runs, request, priority)

    async def begin_completion(self, request: CompletionRequest, priority: int = 0) -> AsyncGenerator[TextDelta, None]:
        """As `completion`, with long texts encoded in a thread, so that other answers go on meanwhile."""
        if sum(map(len, request.prompts)) < LONG_TEXT:
            return self.completion(request, priority)
        return await asyncio.to_thread(self.completion, request, priority)

    async def completion_response(self, request: CompletionRequest, priority: int = 0) -> dict[str, Any]:
        """The whole continuations as a "text_completion" object."""
        head = AnswerHead.new("cmpl", self.model_name)
        whole = [TextDelta(index) for index in range(len(request.prompts))]
        usages: list[Usage] = []
        async with aclosing(await self.begin_completion(request, priority)) as deltas:
            async for delta in deltas:
                known = whole[delta.index]
                whole[delta.index] = TextDelta(
                    delta.index, known.text + delta.text, known.logprobs + delta.logprobs, delta.finish or known.finish
                )
                if delta.usage:
                    usages.append(delta.usage)
        choices = [text_choice(delta, request.logprobs is not None) for delta in whole]
        return head.body("text_completion") | {"choices": choices, "usage": Usage.total(usages).body()}

    async def _chat(
        self, run: _Run, parser: AnswerParser, logprobs: bool, priority: int
    ) -> AsyncGenerator[ChatDelta, None]:
        count = 0
        finish = ""
        async with aclosing(self._progress(run, priority)) as news:
            async for progress in news:
                parts: list[AnswerDelta] = []
                entries: list[TokenLogprob] = []
                for token, logprob in zip(progress.tokens, progress.logprobs, strict=True):
                    count += 1
                    part = parser.add(token)
                    parts.append(part)
                    if logprobs and part.is_content:
                        entries.append(self._logprob(token, logprob))
                    if parser.stopped:
                        break
                finish = "stop" if parser.stopped else progress.finish
                if finish:
                    parts.append(parser.finish())
                    if finish == "stop" and parser.tool_calls:
                        finish = "tool_calls"
                usage = Usage(len(run.prompt), count, parser.reasoning_tokens) if finish else None
                delta = _merge(parts, tuple(entries), finish, usage)
                if not delta.empty:
                    yield delta
                if finish:
                    return

    async def _completions(
        self, runs: Sequence[_Run], request: CompletionRequest, priority: int
    ) -> AsyncGenerator[TextDelta, None]:
        """Merges the streams of all prompts in the order in which news comes."""
        if len(runs) == 1:
            async with aclosing(self._completion(0, runs[0], request, priority)) as only:
                async for delta in only:
                    yield delta
            return
        streams = [self._completion(index, run, request, priority) for index, run in enumerate(runs)]
        news: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue()

        async def pump(stream: AsyncGenerator[TextDelta, None]) -> None:
            try:
                async with aclosing(stream):
                    async for delta in stream:
                        news.put_nowait(delta)
                news.put_nowait(None)
            except Exception as error:  # whoever waits for the news must hear of it
                news.put_nowait(error)

        tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
        try:
            open_streams = len(tasks)
            while open_streams:
                item = await news.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    open_streams -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _completion(
        self, index: int, run: _Run, request: CompletionRequest, priority: int
    ) -> AsyncGenerator[TextDelta, None]:
        stops, text, offset, count = StopStrings(request.stop), Detokenizer(self._tokenizer), 0, 0
        async with aclosing(self._progress(run, priority)) as news:
            async for progress in news:
                shown = ""
                entries: list[TokenLogprob] = []
                for token, logprob in zip(progress.tokens, progress.logprobs, strict=True):
                    count += 1
                    piece = text.add(token)
                    if request.logprobs is not None:
                        entries.append(self._logprob(token, logprob, offset))
                    offset += len(piece)
                    shown += stops.add(piece)
                    if stops.found:
                        break
                finish = "stop" if stops.found else progress.finish
                if finish:
                    shown += stops.add(text.finish()) + stops.finish()
                    yield TextDelta(index, shown, tuple(entries), finish, Usage(len(run.prompt), count))
                    return
                if shown or entries:
                    yield TextDelta(index, shown, tuple(entries))

    async def _progress(self, run: _Run, priority: int) -> AsyncGenerator[Progress, None]:
        """The engine's news of one request. Leaving early cancels it there."""
        generate = Generate(
            request=secrets.token_hex(12),
            prompt=run.prompt,
            max_tokens=run.max_tokens,
            sampling=run.sampling,
            stop_tokens=run.stop_tokens,
            priority=priority,
            score_prompt=False,
        )
        with self._counted_waiting() as first_token_came:
            async with aclosing(self._client.generate(generate)) as news:
                async for progress in news:
                    first_token_came()
                    if progress.finish == "error":
                        raise EngineUnavailable(progress.error)
                    yield progress

    @contextmanager
    def _counted_waiting(self) -> Iterator[Callable[[], None]]:
        """Counts a request as waiting until the yielded function is called."""
        self._waiting += 1
        waits = True

        def stop_waiting() -> None:
            nonlocal waits
            if waits:
                self._waiting -= 1
                self._queue_clock.left(time.monotonic())
            waits = False

        try:
            yield stop_waiting
        finally:
            stop_waiting()

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            message = f"there is no model {name!r}; this server has {self.model_name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    def _check_room(self, count: int) -> None:
        if count > self.limits.max_waiting:
            message = f"'prompt': {count} prompts in one request; at most {self.limits.max_waiting} may wait at once"
            raise RequestError(message, param="prompt", code="invalid_request")
        if self._waiting + count > self.limits.max_waiting:
            message = f"{self._waiting} requests wait already, of at most {self.limits.max_waiting}; try again later"
            seconds = self._queue_clock.seconds_for(self._waiting, time.monotonic())
            raise RequestError(message, status=429, code="queue_full", retry_after=seconds)

    def _prompt_ids(self, prompt: str | list[int], where: str) -> list[int]:
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt, allow_special=False)
            if not ids:
                raise RequestError(f"'{where}' is empty", param=where, code="invalid_request")
            return ids
        for position, token in enumerate(prompt):
            if not 0 <= token < self._tokenizer.size:
                message = f"'{where}[{position}]': {token} is no token; ids are 0 to {self._tokenizer.size - 1}"
                raise RequestError(message, param=where, code="invalid_request")
        return prompt

    def _run(self, request: ChatRequest | CompletionRequest, prompt: list[int], where: str, temperature: float) -> _Run:
        limit = self.limits.context_length
        room = limit - len(prompt)
        if room < 1:
            message = f"the prompt has {len(prompt)} tokens; the context holds {limit}, an answer included"
            raise RequestError(message, param=where, code="context_length_exceeded")
        asked = request.token_limit
        if asked is not None and asked > room:
            message = f"the prompt's {len(prompt)} tokens and max_tokens {asked} exceed the context of {limit} tokens"
            raise RequestError(message, param="max_tokens", code="context_length_exceeded")
        seed = secrets.randbits(63) if request.seed is None else request.seed & (2**63 - 1)
        sampling = Sampling(
            temperature=temperature if request.temperature is None else request.temperature,
            top_p=TOP_P if request.top_p is None else request.top_p,
            top_k=max(request.top_k or 0, 0),
            seed=seed,
        )
        default = min(self.limits.default_max_tokens or room, room)
        stop_tokens = () if request.ignore_eos else self._end_tokens
        return _Run(tuple(prompt), default if asked is None else asked, sampling, stop_tokens)

    def _logprob(self, token: int, logprob: float, offset: int = 0) -> TokenLogprob:
        data = self._tokenizer.token_bytes(token)
        return TokenLogprob(self._tokenizer.token_name(token), logprob, data, offset)


def _message(message: ChatMessage) -> Message:
    return Message(
        role=message.role,
        content=message.content or "",
        name=message.name or "",
        reasoning_content=message.reasoning_content or "",
        tool_calls=tuple(ToolCall(call.id, call.function.arguments) for call in message.tool_calls or ()),
        tool_call_id=message.tool_call_id or "",
    )


def _merge(
    parts: Sequence[AnswerDelta], entries: tuple[TokenLogprob, ...], finish: str, usage: Usage | None
) -> ChatDelta:
    calls: list[ToolCallDelta] = []
    for call in (part.tool_call for part in parts):
        if call is None:
            continue
        if calls and calls[-1].index == call.index:
            last = calls.pop()
            call = ToolCallDelta(last.index, last.id, last.name, last.arguments + call.arguments)
        calls.append(call)
    return ChatDelta(
        reasoning="".join(part.reasoning for part in parts),
        content="".join(part.content for part in parts),
        tool_calls=tuple(calls),
        logprobs=entries,
        finish=finish,
        usage=usage,
    )
