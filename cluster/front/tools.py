"""Tool calls out of a model's tokens, in Kimi's format.

`<|tool_calls_section_begin|>`, then for every call `<|tool_call_begin|>functions.NAME:IDX<|tool_call_argument_begin|>
{json}<|tool_call_end|>`, then `<|tool_calls_section_end|>`. The markers are single tokens, so what is found cannot
depend on how a stream was cut.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..tokenizer import Detokenizer, Tokenizer

SECTION_BEGIN = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"
CALL_BEGIN = "<|tool_call_begin|>"
ARGUMENTS_BEGIN = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"

_HEADER = re.compile(r"(?:functions\.)?(?P<name>.+?)(?::(?P<index>\d+))?", re.DOTALL)


@dataclass(frozen=True)
class ToolCallDelta:
    """News of call number `index` of this answer. id and name come once, with the first delta; arguments in pieces."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class ToolSection:
    """Reads the tokens of an answer's tool sections; one object serves all sections of an answer.

    Text between calls is dropped. A call whose header ended without a name is dropped as well, since a client could do
    nothing with it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._call_begin = tokenizer.special[CALL_BEGIN]
        self._arguments_begin = tokenizer.special[ARGUMENTS_BEGIN]
        self._call_end = tokenizer.special[CALL_END]
        self._state = "between"
        self._header: list[int] = []
        self._text = Detokenizer(tokenizer)
        self.calls = 0

    def add(self, token: int) -> ToolCallDelta | None:
        """What `token`, one inside a section, completes."""
        if token == self._call_begin:
            delta = self._end_call()
            self._state, self._header = "header", []
            return delta
        if token == self._call_end:
            return self._end_call()
        if self._state == "header":
            if token == self._arguments_begin:
                return self._begin_arguments()
            self._header.append(token)
        elif self._state == "arguments":
            return self._piece(self._text.add(token))
        return None

    def finish(self) -> ToolCallDelta | None:
        """The section's or the answer's end; what is left of an open call."""
        return self._end_call()

    def _begin_arguments(self) -> ToolCallDelta | None:
        match = _HEADER.fullmatch(self._tokenizer.decode(self._header).strip())
        if match is None:
            self._state = "between"
            return None
        self._state = "arguments"
        self._text = Detokenizer(self._tokenizer)
        self.calls += 1
        index = self.calls - 1
        name = match["name"]
        return ToolCallDelta(index=index, id=f"functions.{name}:{match['index'] or index}", name=name)

    def _end_call(self) -> ToolCallDelta | None:
        was, self._state = self._state, "between"
        return self._piece(self._text.finish()) if was == "arguments" else None

    def _piece(self, text: str) -> ToolCallDelta | None:
        return ToolCallDelta(index=self.calls - 1, arguments=text) if text else None
