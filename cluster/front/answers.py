"""OpenAI's JSON objects for answers, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .tools import ToolCallDelta


@dataclass(frozen=True)
class Usage:
    """Counts of tokens. reasoning_tokens are part of completion_tokens, cached_tokens of prompt_tokens.

    A prompt with several choices counts once, in the usage of its first choice.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0

    @staticmethod
    def total(usages: Sequence[Usage]) -> Usage:
        """The counts of several choices together."""
        return Usage(
            sum(usage.prompt_tokens for usage in usages),
            sum(usage.completion_tokens for usage in usages),
            sum(usage.reasoning_tokens for usage in usages),
            sum(usage.cached_tokens for usage in usages),
        )

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


# What OpenAI writes for a token without any probability; JSON has no infinity.
NO_PROBABILITY = -9999.0


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer's text and its log probability. text_offset: where it begins in a completion's text.

    top: the most probable tokens in its place, best first.
    """

    token: str
    logprob: float
    data: bytes
    text_offset: int = 0
    top: tuple[TokenLogprob, ...] = ()

    @property
    def told(self) -> float:
        """The log probability as a number that JSON has."""
        return max(self.logprob, NO_PROBABILITY)

    def body(self) -> dict[str, Any]:
        """An entry of a chat choice's "logprobs"."""
        return self._body() | {"top_logprobs": [entry._body() for entry in self.top]}

    def by_text(self) -> dict[str, float]:
        """An entry of a completion's "top_logprobs": the most probable tokens and this one, by their text.

        Of tokens with the same text, such as parts of characters, the most probable one counts.
        """
        found: dict[str, float] = {}
        for entry in (*self.top, self):
            found.setdefault(entry.token, entry.told)
        return found

    def _body(self) -> dict[str, Any]:
        return {"token": self.token, "logprob": self.told, "bytes": list(self.data)}


@dataclass(frozen=True)
class ChatDelta:
    """News of choice `index` of a chat answer.

    finish: "" while it runs, else "stop", "length" or "tool_calls"; then `usage` is set.
    """

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str = ""
    usage: Usage | None = None
    index: int = 0

    @property
    def empty(self) -> bool:
        return not (self.reasoning or self.content or self.tool_calls or self.logprobs or self.finish)


@dataclass(frozen=True)
class TextDelta:
    """News of choice `index` of a text completion. usage, and mean_logprob of all its tokens: with the finish."""

    index: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str = ""
    usage: Usage | None = None
    mean_logprob: float = 0.0

    def plus(self, delta: TextDelta) -> TextDelta:
        """This and the news that follow it."""
        return replace(delta, text=self.text + delta.text, logprobs=self.logprobs + delta.logprobs)


@dataclass(frozen=True)
class AnswerHead:
    """What all chunks of an answer share."""

    id: str
    created: int
    model: str

    @staticmethod
    def new(prefix: str, model: str) -> AnswerHead:
        return AnswerHead(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model)

    def body(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def chat_chunk(
    head: AnswerHead, index: int, delta: dict[str, Any], finish: str, logprobs: Sequence[TokenLogprob] | None
) -> dict[str, Any]:
    """A "chat.completion.chunk" of choice `index`. logprobs: None if they were not asked for."""
    choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish or None}
    choice["logprobs"] = None if logprobs is None else {"content": [entry.body() for entry in logprobs]}
    return head.body("chat.completion.chunk") | {"choices": [choice]}


def delta_body(delta: ChatDelta) -> dict[str, Any]:
    """The "delta" object of a chunk: only what is new."""
    body: dict[str, Any] = {}
    if delta.reasoning:
        body["reasoning_content"] = delta.reasoning
    if delta.content:
        body["content"] = delta.content
    if delta.tool_calls:
        body["tool_calls"] = [_tool_call_delta(call) for call in delta.tool_calls]
    return body


def usage_chunk(head: AnswerHead, kind: str, usage: Usage) -> dict[str, Any]:
    """The last chunk with `stream_options.include_usage`: no choices."""
    return head.body(kind) | {"choices": [], "usage": usage.body()}


def text_choice(delta: TextDelta, logprobs: int | None) -> dict[str, Any]:
    """A choice of a "text_completion", whole or a chunk's. logprobs: as in the request; with 0 there is no top."""
    choice: dict[str, Any] = {"index": delta.index, "text": delta.text, "finish_reason": delta.finish or None}
    choice["logprobs"] = None
    if logprobs is not None:
        choice["logprobs"] = {
            "tokens": [entry.token for entry in delta.logprobs],
            "token_logprobs": [entry.told for entry in delta.logprobs],
            "top_logprobs": [entry.by_text() for entry in delta.logprobs] if logprobs else None,
            "text_offset": [entry.text_offset for entry in delta.logprobs],
        }
    return choice


def best_choices(whole: Sequence[TextDelta], count: int, candidates: int) -> list[TextDelta]:
    """Of every `candidates` of the finished continuations the `count` with the highest mean log probability, best first
    and equal ones in their order, numbered anew. All in their order where there are no more."""
    if count == candidates:
        return list(whole)
    groups = [whole[begin : begin + candidates] for begin in range(0, len(whole), candidates)]
    best = [each for group in groups for each in sorted(group, key=lambda delta: -delta.mean_logprob)[:count]]
    return [replace(delta, index=index) for index, delta in enumerate(best)]


@dataclass
class ChatAnswer:
    """Gathers one choice of a chat answer from its deltas."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = ""
    usage: Usage = Usage(0, 0)

    def add(self, delta: ChatDelta) -> None:
        self.reasoning += delta.reasoning
        self.content += delta.content
        self.logprobs += delta.logprobs
        self.finish = delta.finish or self.finish
        self.usage = delta.usage or self.usage
        for call in delta.tool_calls:
            if call.index == len(self.tool_calls):
                self.tool_calls.append(call)
            else:
                known = self.tool_calls[call.index]
                whole = known.arguments + call.arguments
                self.tool_calls[call.index] = ToolCallDelta(known.index, known.id, known.name, whole)

    def choice(self, index: int, logprobs: bool) -> dict[str, Any]:
        """A choice of a "chat.completion"."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.tool_calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [_tool_call(call) for call in self.tool_calls]
        choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": self.finish}
        choice["logprobs"] = {"content": [entry.body() for entry in self.logprobs]} if logprobs else None
        return choice


def chat_body(head: AnswerHead, answers: Sequence[ChatAnswer], logprobs: bool) -> dict[str, Any]:
    """A "chat.completion" object."""
    choices = [answer.choice(index, logprobs) for index, answer in enumerate(answers)]
    usage = Usage.total([answer.usage for answer in answers])
    return head.body("chat.completion") | {"choices": choices, "usage": usage.body()}


def _tool_call(call: ToolCallDelta) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tool_call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if not call.id:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index} | _tool_call(call)
