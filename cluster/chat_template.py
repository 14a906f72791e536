"""Kimi-K2.5's chat format, from messages to the pieces of a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import pass_context
from jinja2.runtime import Context
from markupsafe import Markup

from .tokenizer import Piece

# Frames a caller's text in the rendered template. Callers' text itself never enters it, only its number does.
_HOLD = "\x00"


@dataclass(frozen=True)
class ToolCall:
    """A call in an assistant's message. id: "functions.NAME:IDX". arguments: a JSON object, as text."""

    id: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn. role: "system", "user", "assistant" or "tool". name replaces the role's name in the turn's header."""

    role: str
    content: str = ""
    name: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


def render(messages: Sequence[Message], tools: Sequence[dict[str, Any]], thinking: bool) -> str:
    """The prompt as text. For reading and tests: to encode it, use `render_pieces`."""
    return "".join(piece.text for piece in render_pieces(messages, tools, thinking))


def render_pieces(messages: Sequence[Message], tools: Sequence[dict[str, Any]], thinking: bool) -> list[Piece]:
    """The prompt that asks for the next assistant turn, the template's own words apart from the callers'.

    Thinking of earlier turns is kept only after the last assistant message that calls no tool, so that a chain of tool
    calls keeps its thinking and finished answers lose theirs.
    """
    answers = [i for i, message in enumerate(messages) if message.role == "assistant" and not message.tool_calls]
    held: list[str] = []
    text = _template().render(
        held=held,
        messages=messages,
        tools=json.dumps(list(tools), ensure_ascii=False, separators=(",", ":")) if tools else "",
        thinking=thinking,
        last_answer=answers[-1] if answers else -1,
    )
    pieces = []
    for index, part in enumerate(text.split(_HOLD)):
        piece = Piece(held[int(part)], literal=False) if index % 2 else Piece(part, literal=True)
        if piece.text:
            pieces.append(piece)
    return pieces


@pass_context
def _hold(context: Context, value: Any) -> Markup:
    """Called by jinja on every value in double braces; what a macro returns is Markup and holds its values already."""
    if isinstance(value, Markup):
        return value
    held: list[str] = context["held"]
    held.append(str(value))
    return Markup(f"{_HOLD}{len(held) - 1}{_HOLD}")


@cache
def _template() -> jinja2.Template:
    source = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, finalize=_hold, undefined=jinja2.StrictUndefined)
    return environment.from_string(source)
