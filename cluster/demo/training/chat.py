"""Kimi-K2.5's chat format as text, for OpenAI-style messages and tools."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

MIDDLE = "<|im_middle|>"
END = "<|im_end|>"
ASSISTANT = f"<|im_assistant|>assistant{MIDDLE}"
THINK, THINK_END = "<think>", "</think>"
CALLS_BEGIN, CALLS_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_ARGUMENT, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


def compact(value: object) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def tool_call(name: str, arguments: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A call as OpenAI's messages hold it; ``index`` counts the calls of the whole conversation."""
    function = {"name": name, "arguments": compact(arguments)}
    return {"id": f"functions.{name}:{index}", "type": "function", "function": function}


def calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """The section of tool calls that the assistant writes."""
    inner = (f"{CALL_BEGIN}{call['id']}{CALL_ARGUMENT}{call['function']['arguments']}{CALL_END}" for call in calls)
    return CALLS_BEGIN + "".join(inner) + CALLS_END if calls else ""


def turn(message: Message, is_history: bool) -> str:
    """One message; an assistant's thought is kept only after the last message that calls no tool."""
    role = message["role"]
    content = message.get("content") or ""
    if role == "user":
        return f"<|im_user|>user{MIDDLE}{content}{END}"
    if role == "system":
        return f"<|im_system|>system{MIDDLE}{content}{END}"
    if role == "tool":
        name = message.get("name") or "tool"
        return f"<|im_system|>{name}{MIDDLE}## Return of {message['tool_call_id']}\n{content}{END}"
    thought = "" if is_history else message.get("reasoning_content") or ""
    return f"{ASSISTANT}{THINK}{thought}{THINK_END}{content}{calls_text(message.get('tool_calls') or ())}{END}"


def last_plain_answer(messages: Sequence[Message]) -> int:
    """The index of the last assistant message that calls no tool, or -1."""
    indices = (i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls"))
    return max(indices, default=-1)


def render(messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool = True) -> str:
    """The prompt from which the assistant's next message is generated."""
    last = last_plain_answer(messages)
    declared = f"<|im_system|>tool_declare{MIDDLE}{compact(list(tools))}{END}" if tools else ""
    turns = "".join(turn(message, index <= last) for index, message in enumerate(messages))
    return declared + turns + ASSISTANT + THINK + ("" if thinking else THINK_END)
