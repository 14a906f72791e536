"""A chat answer out of a model's tokens: thinking, content and tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from ..tokenizer import Detokenizer, Tokenizer
from .stops import StopStrings
from .tools import SECTION_BEGIN, SECTION_END, ToolCallDelta, ToolSection

THINK_BEGIN = "<think>"
THINK_END = "</think>"


@dataclass(frozen=True)
class AnswerDelta:
    """What one token completes. is_content: the token itself belongs to the content, shown or held back."""

    reasoning: str = ""
    content: str = ""
    tool_call: ToolCallDelta | None = None
    is_content: bool = False


class AnswerParser:
    """Takes an answer's tokens one by one.

    thinking: the prompt ended inside `<think>`, so the answer begins there. A tool section that begins inside the
    thinking ends it. Without `tools` the markers of tool calls are content, by name, as nobody asked for calls.
    Stop strings are looked for in the content alone, behind the answer's first `min_tokens` tokens; `stopped` says that
    one was found.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, thinking: bool, tools: bool, stops: tuple[str, ...] = (), min_tokens: int = 0
    ) -> None:
        special = tokenizer.special
        self._tokenizer = tokenizer
        self._think_begin, self._think_end = special[THINK_BEGIN], special[THINK_END]
        self._section_begin, self._section_end = special[SECTION_BEGIN], special[SECTION_END]
        self._tool_markers = {token for name, token in special.items() if name.startswith("<|tool_call")}
        self._tools = tools
        self._section = ToolSection(tokenizer)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._text = Detokenizer(tokenizer)
        self._state = "reasoning" if thinking else "content"
        self.reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._stops.found

    @property
    def tool_calls(self) -> int:
        """Calls begun so far."""
        return self._section.calls

    def add(self, token: int) -> AnswerDelta:
        """What `token` completes."""
        self._tokens += 1
        if self._state == "reasoning":
            self.reasoning_tokens += 1
        if token == self._think_begin:
            return self._turn("reasoning")
        if token == self._think_end:
            return self._turn("content")
        if self._tools and token == self._section_begin:
            return self._turn("tools")
        if self._state == "tools":
            if token == self._section_end:
                return self._turn("content")
            return AnswerDelta(tool_call=self._section.add(token))
        if token in self._tool_markers:
            return self._show(self._text.finish() + self._tokenizer.token_name(token))
        return self._show(self._text.add(token))

    def finish(self) -> AnswerDelta:
        """The answer's end: text that was held back, and what is left of an open tool call."""
        delta = self._turn("content")
        return AnswerDelta(delta.reasoning, delta.content + self._stops.finish(), delta.tool_call)

    def _show(self, text: str) -> AnswerDelta:
        if self._state == "reasoning":
            return AnswerDelta(reasoning=text)
        return AnswerDelta(content=self._search(text), is_content=True)

    def _search(self, text: str) -> str:
        return text if self._tokens <= self._min_tokens else self._stops.add(text)

    def _turn(self, state: str) -> AnswerDelta:
        """Ends the part that runs and begins another. A change to the part that runs already changes nothing."""
        if state == self._state and state == "reasoning":
            return AnswerDelta()
        was, self._state = self._state, state
        rest = self._text.finish()
        self._text = Detokenizer(self._tokenizer)
        if was == "tools":
            return AnswerDelta(tool_call=self._section.finish())
        if was == "reasoning":
            return AnswerDelta(reasoning=rest)
        content = self._search(rest)
        if state != "content":
            content += self._stops.finish()
        return AnswerDelta(content=content)
