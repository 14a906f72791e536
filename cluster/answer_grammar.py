"""The grammar of a whole answer: thinking, then content of a given form, or calls of tools, in Kimi's format.

An answer has one when its content must have a form, when it must call a tool, when the arguments of a tool that is
`strict` must follow its schema, or when there may be one call at most. The thinking is free text up to its end. Special
tokens are written where the format has them, and nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .front.reasoning import THINK_END
from .front.requests import ChatRequest, CompletionRequest, Tool
from .front.structured_output import Format, json_format, refused
from .front.tools import ARGUMENTS_BEGIN, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END
from .tokenizer import Tokenizer

ANY_OBJECT = {"type": "object"}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class AnswerGrammar:
    """text: as in `Sampling.grammar`. place: the field of the request that asks for it."""

    text: str
    place: str


def completion_grammar(request: CompletionRequest) -> AnswerGrammar | None:
    """None: any text. Raises RequestError for a form that cannot be enforced."""
    form = request.form()
    return None if form is None else _grammar(form[1], form[0])


def chat_grammar(request: ChatRequest, tokenizer: Tokenizer) -> AnswerGrammar | None:
    """As `completion_grammar`."""
    form, tools = request.form(), request.callable_tools
    forced = bool(tools) and request.must_call
    bound = forced or any(tool.function.strict for _, tool in tools) or (tools and not request.may_call_often)
    if form is None and not bound:
        return None
    place, content = form or ("tools", _Words(tokenizer).free_text())
    words = _Words(tokenizer)
    if tools:
        section = words.section([words.call(index, tool, forced) for index, tool in tools], request.may_call_often)
        if forced:
            place, content = "tools", section
        elif form is None:
            content = _sequence(content, {"type": "optional", "content": section})
        else:
            content = {"type": "or", "elements": [content, section]}
    if request.thinks:
        content = _sequence(words.free_text(), words.token(THINK_END), content)
    return _grammar(content, place)


class _Words:
    """Parts of an answer in a model's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = tokenizer.special

    def token(self, name: str) -> Format:
        return {"type": "token", "token": self._special[name]}

    def free_text(self) -> Format:
        return {"type": "any_tokens", "exclude_tokens": sorted(self._special.values())}

    def call(self, index: int, tool: Tool, forced: bool) -> Format:
        """A call of one tool, number `index` of the request's. Its arguments follow its schema if it is `strict`, and
        where calls are forced also if it does not say."""
        function = tool.function
        schema: Any = ANY_OBJECT
        if function.strict or (forced and function.strict is None):
            schema = function.parameters or NO_ARGUMENTS
            if schema.get("type", "object") != "object":
                raise refused(f"tools[{index}].function.parameters.type", "must be 'object'")
        return _sequence(
            self.token(CALL_BEGIN),
            {"type": "const_string", "value": f"functions.{function.name}:"},
            {"type": "regex", "pattern": "0|[1-9][0-9]{0,3}"},
            self.token(ARGUMENTS_BEGIN),
            json_format(schema, f"tools[{index}].function.parameters"),
            self.token(CALL_END),
        )

    def section(self, calls: list[Format], several: bool) -> Format:
        one: Format = {"type": "or", "elements": calls}
        inner: Format = {"type": "plus", "content": one} if several else one
        return _sequence(self.token(SECTION_BEGIN), inner, self.token(SECTION_END))


def _sequence(*parts: Format) -> Format:
    return {"type": "sequence", "elements": list(parts)}


def _grammar(content: Format, place: str) -> AnswerGrammar:
    return AnswerGrammar(json.dumps({"type": "structural_tag", "format": content}), place)
