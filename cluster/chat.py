"""Chat and text completions without a transport: HTTP, batch jobs and evaluations use this one service.

Request in, checked; prompt rendered and tokenized; tokens from the engine; text, thinking, tool calls and counts out.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, Protocol

from ..actors.request import Generate, Progress
from .answer_grammar import chat_grammar, completion_grammar
from .answer_run import AnswerRun, RunMaker, ServiceLimits
from .chat_template import Message, ToolCall, render_pieces
from .front.answers import (
    AnswerHead,
    ChatAnswer,
    ChatDelta,
    TextDelta,
    TokenLogprob,
    Usage,
    best_choices,
    chat_body,
    text_choice,
)
from .front.errors import EngineUnavailable, RequestError
from .front.merged import merged
from .front.queue_clock import QueueClock
from .front.reasoning import AnswerDelta, AnswerParser
from .front.requests import ChatMessage, ChatRequest, CompletionRequest
from .front.stops import StopStrings
from .front.tokenizing import DetokenizeRequest, TokenizeRequest
from .front.tools import ToolCallDelta
from .grammar_check import GrammarCheck
from .tokenizer import Detokenizer, Tokenizer

# Kimi-K2.5's recommended temperatures.
THINKING_TEMPERATURE = 1.0
INSTANT_TEMPERATURE = 0.6

# Characters; encoding takes 90 ms a million, and the tokenizer lets other threads run meanwhile.
LONG_TEXT = 16_384


class TokenSource(Protocol):
    """Where tokens come from: an `EngineClient`. Closing the generator cancels the request."""

    def generate(self, request: Generate) -> AsyncGenerator[Progress, None]: ...


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
        self._maker = RunMaker(tokenizer, limits)
        self._grammars = GrammarCheck(tokenizer.folder)
        self._waiting = 0
        self._queue_clock = QueueClock()

    def chat(self, request: ChatRequest, priority: int = 0) -> AsyncGenerator[ChatDelta, None]:
        """The answer's choices as they come. Checks the request before it returns; `priority` as in `Generate`."""
        self._check_model(request.model)
        self._check_room(request.choices, "n")
        prompt = self._chat_ids(request.messages, request.offered_tools, request.thinks)
        temperature = THINKING_TEMPERATURE if request.thinks else INSTANT_TEMPERATURE
        grammar = chat_grammar(request, self._tokenizer)
        runs = self._maker.runs(request, prompt, "messages", temperature, request.choices, grammar)
        return merged([self._chat(index, run, request, priority) for index, run in enumerate(runs)])

    async def begin_chat(self, request: ChatRequest, priority: int = 0) -> AsyncGenerator[ChatDelta, None]:
        """As `chat`, with a long text encoded in a thread, so that other answers go on meanwhile, and behind a check of
        the answer's grammar, if it has one."""
        if (grammar := chat_grammar(request, self._tokenizer)) is not None:
            await self._grammars.check(grammar)
        if _characters(request.messages, request.offered_tools) < LONG_TEXT:
            return self.chat(request, priority)
        return await asyncio.to_thread(self.chat, request, priority)

    async def chat_response(self, request: ChatRequest, priority: int = 0) -> dict[str, Any]:
        """The whole answer as a "chat.completion" object."""
        head = AnswerHead.new("chatcmpl", self.model_name)
        answers = [ChatAnswer() for _ in range(request.choices)]
        async with aclosing(await self.begin_chat(request, priority)) as deltas:
            async for delta in deltas:
                answers[delta.index].add(delta)
        return chat_body(head, answers, bool(request.logprobs))

    def completion(self, request: CompletionRequest, priority: int = 0) -> AsyncGenerator[TextDelta, None]:
        """The continuations of all prompts as they come, `candidates` of each. Checks the request before it returns."""
        self._check_model(request.model)
        self._check_room(len(request.prompts) * request.candidates, "prompt")
        runs: list[AnswerRun] = []
        grammar = completion_grammar(request)
        for index, prompt in enumerate(request.prompts):
            where = "prompt" if len(request.prompts) == 1 else f"prompt[{index}]"
            ids = self._prompt_ids(prompt, where)
            runs += self._maker.runs(request, ids, where, THINKING_TEMPERATURE, request.candidates, grammar)
        return merged([self._completion(index, run, request, priority) for index, run in enumerate(runs)])

    async def begin_completion(self, request: CompletionRequest, priority: int = 0) -> AsyncGenerator[TextDelta, None]:
        """As `completion`, with long texts encoded in a thread, so that other answers go on meanwhile, and behind a
        check of the answers' grammar, if they have one."""
        if (grammar := completion_grammar(request)) is not None:
            await self._grammars.check(grammar)
        if sum(map(len, request.prompts)) < LONG_TEXT:
            return self.completion(request, priority)
        return await asyncio.to_thread(self.completion, request, priority)

    async def completion_response(self, request: CompletionRequest, priority: int = 0) -> dict[str, Any]:
        """The whole continuations as a "text_completion" object."""
        head = AnswerHead.new("cmpl", self.model_name)
        whole = [TextDelta(index) for index in range(len(request.prompts) * request.candidates)]
        async with aclosing(await self.begin_completion(request, priority)) as deltas:
            async for delta in deltas:
                whole[delta.index] = whole[delta.index].plus(delta)
        usage = Usage.total([delta.usage for delta in whole if delta.usage])
        best = best_choices(whole, request.choices, request.candidates)
        choices = [text_choice(delta, request.logprobs) for delta in best]
        return head.body("text_completion") | {"choices": choices, "usage": usage.body()}

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """vLLM's answer: the tokens of a text or of a rendered chat, and how many a prompt and its answer may have."""
        self._check_model(request.model or self.model_name)
        if request.messages is not None:
            long = _characters(request.messages, request.offered_tools) >= LONG_TEXT
            work = partial(self._chat_ids, request.messages, request.offered_tools, request.thinks)
        else:
            text = request.prompt or ""
            long = len(text) >= LONG_TEXT
            work = partial(self._tokenizer.encode, text, allow_special=False)
        tokens = await asyncio.to_thread(work) if long else work()
        names = [self._tokenizer.token_name(token) for token in tokens] if request.return_token_strs else None
        most = self.limits.context_length
        return {"count": len(tokens), "max_model_len": most, "tokens": tokens, "token_strs": names}

    def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """vLLM's answer: the text of tokens, of special ones their names."""
        self._check_model(request.model or self.model_name)
        self._check_ids(request.tokens, "tokens")
        return {"prompt": self._tokenizer.decode(request.tokens, named=True)}

    async def _chat(
        self, index: int, run: AnswerRun, request: ChatRequest, priority: int
    ) -> AsyncGenerator[ChatDelta, None]:
        parser = AnswerParser(
            self._tokenizer,
            thinking=request.thinks,
            tools=bool(request.offered_tools),
            stops=request.stop,
            min_tokens=run.sampling.min_tokens,
        )
        count = cached = 0
        async with aclosing(self._progress(run, priority)) as news:
            async for progress in news:
                cached += progress.cached_tokens
                parts: list[AnswerDelta] = []
                entries: list[TokenLogprob] = []
                for token, logprob, top in _tokens(progress):
                    count += 1
                    part = parser.add(token)
                    parts.append(part)
                    if request.logprobs and part.is_content:
                        entries.append(self._logprob(token, logprob, top))
                    if parser.stopped:
                        break
                finish = "stop" if parser.stopped else progress.finish
                if finish:
                    parts.append(parser.finish())
                    if finish == "stop" and parser.tool_calls:
                        finish = "tool_calls"
                usage = _usage(run, count, cached, parser.reasoning_tokens) if finish else None
                delta = _merge(index, parts, tuple(entries), finish, usage)
                if not delta.empty:
                    yield delta
                if finish:
                    return

    async def _completion(
        self, index: int, run: AnswerRun, request: CompletionRequest, priority: int
    ) -> AsyncGenerator[TextDelta, None]:
        stops, text, offset = StopStrings(request.stop), Detokenizer(self._tokenizer), 0
        count, cached, total = 0, 0, 0.0
        async with aclosing(self._progress(run, priority)) as news:
            async for progress in news:
                cached += progress.cached_tokens
                shown = ""
                entries: list[TokenLogprob] = []
                for token, logprob, top in _tokens(progress):
                    count += 1
                    total += logprob
                    piece = text.add(token)
                    if request.logprobs is not None:
                        entries.append(self._logprob(token, logprob, top, offset))
                    offset += len(piece)
                    shown += piece if count <= run.sampling.min_tokens else stops.add(piece)
                    if stops.found:
                        break
                finish = "stop" if stops.found else progress.finish
                if finish:
                    shown += stops.add(text.finish()) + stops.finish()
                    usage = _usage(run, count, cached)
                    yield TextDelta(index, shown, tuple(entries), finish, usage, total / max(count, 1))
                    return
                if shown or entries:
                    yield TextDelta(index, shown, tuple(entries))

    async def _progress(self, run: AnswerRun, priority: int) -> AsyncGenerator[Progress, None]:
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

    def _check_room(self, count: int, where: str) -> None:
        if count > self.limits.max_waiting:
            message = f"'{where}': {count} answers in one request; at most {self.limits.max_waiting} may wait at once"
            raise RequestError(message, param=where, code="invalid_request")
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
        self._check_ids(prompt, where)
        return prompt

    def _check_ids(self, tokens: list[int], where: str) -> None:
        for position, token in enumerate(tokens):
            if not 0 <= token < self._tokenizer.size:
                message = f"'{where}[{position}]': {token} is no token; ids are 0 to {self._tokenizer.size - 1}"
                raise RequestError(message, param=where, code="invalid_request")

    def _chat_ids(self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]], thinks: bool) -> list[int]:
        pieces = render_pieces([_message(message) for message in messages], tools, thinks)
        return self._tokenizer.encode_prompt(pieces)

    def _logprob(self, token: int, logprob: float, top: tuple[tuple[int, float], ...], offset: int = 0) -> TokenLogprob:
        name, data = self._tokenizer.token_name(token), self._tokenizer.token_bytes(token)
        return TokenLogprob(name, logprob, data, offset, tuple(self._logprob(*each, ()) for each in top))


def _tokens(progress: Progress) -> Iterator[tuple[int, float, tuple[tuple[int, float], ...]]]:
    """Each token with its log probability and the most probable ones in its place."""
    tops = progress.top_logprobs or ((),) * len(progress.tokens)
    return zip(progress.tokens, progress.logprobs, tops, strict=True)


def _usage(run: AnswerRun, count: int, cached: int, reasoning: int = 0) -> Usage:
    return Usage(len(run.prompt), count, reasoning, cached) if run.first else Usage(0, count, reasoning)


def _characters(messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]]) -> int:
    """About how long the text of a chat's prompt is."""
    texts = [text for message in messages for text in (message.content, message.reasoning_content) if text]
    calls = [call.function.arguments for message in messages for call in message.tool_calls or ()]
    return sum(map(len, texts)) + sum(map(len, calls)) + len(repr(tools))


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
    index: int, parts: Sequence[AnswerDelta], entries: tuple[TokenLogprob, ...], finish: str, usage: Usage | None
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
        index=index,
    )
