"""Tasks with right answers: reading them, and deciding whether a chat answer is right."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..text_lines import open_text

FIELDS = ("family", "split", "messages", "tools", "answer", "thinking", "prompt")


class TaskError(ValueError):
    """A file of tasks is not what it should be; the message names the file, the line and the field."""


@dataclass(frozen=True)
class Call:
    """A tool call, its arguments as a JSON value: order of keys and spaces do not count."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class Task:
    """A conversation that ends where the assistant answers, and what it should answer.

    family: what is asked. split: what about it the model never saw in training ("" if nothing is said). answer: the
    exact content, or the exact tool calls. thinking: whether the assistant thinks first.
    """

    family: str
    split: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    answer: str | tuple[Call, ...]
    thinking: bool

    def request(self, model: str, max_tokens: int) -> dict[str, Any]:
        """The chat request that asks it, greedily."""
        body: dict[str, Any] = {
            "model": model,
            "messages": list(self.messages),
            "temperature": 0,
            "max_tokens": max_tokens,
            "thinking": self.thinking,
        }
        return body | {"tools": list(self.tools)} if self.tools else body

    def is_right(self, message: Mapping[str, Any]) -> bool:
        """Whether an assistant's message (OpenAI's form) is the right answer, nothing more and nothing less."""
        calls = message.get("tool_calls") or []
        content = message.get("content") or ""
        if isinstance(self.answer, str):
            return not calls and content.strip() == self.answer.strip()
        try:
            found = [Call(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
        except ValueError:
            return False
        return not content.strip() and [(c.name, _typed(c.arguments)) for c in found] == [
            (c.name, _typed(c.arguments)) for c in self.answer
        ]


def _typed(value: Any) -> Any:
    """The value in a form that tells 1, 1.0 and true apart and does not care for the order of keys."""
    return json.dumps(value, sort_keys=True)


def read_tasks(path: Path) -> Iterator[Task]:
    """Reads JSON lines (also .xz) of tasks. Raises TaskError."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield _task(json.loads(line))
                except ValueError as error:
                    raise TaskError(f"{path} line {number}: {error}") from None


def choose(tasks: Iterable[Task], count: int) -> list[Task]:
    """At most `count` tasks of each family, its splits in turns, in the order in which they stand."""
    families: dict[str, dict[str, list[Task]]] = defaultdict(lambda: defaultdict(list))
    for task in tasks:
        families[task.family][task.split].append(task)
    chosen = []
    for splits in families.values():
        queues = [iter(queue) for queue in splits.values()]
        taken: list[Task] = []
        while queues and len(taken) < count:
            for queue in list(queues):
                if (task := next(queue, None)) is None:
                    queues.remove(queue)
                elif len(taken) < count:
                    taken.append(task)
        chosen += taken
    return chosen


def _task(content: Any) -> Task:
    if not isinstance(content, dict):
        raise ValueError("must be a JSON object")
    for name in content:
        if name not in FIELDS:
            raise ValueError(f"{name}: unknown field; a task has {', '.join(FIELDS)}")
    family = content.get("family")
    if not isinstance(family, str) or not family:
        raise ValueError("family: must be a non-empty string")
    split = content.get("split", "")
    if not isinstance(split, str):
        raise ValueError("split: must be a string")
    thinking = content.get("thinking", not str(content.get("prompt", "")).endswith("</think>"))
    if not isinstance(thinking, bool):
        raise ValueError("thinking: must be true or false")
    messages = _objects(content, "messages")
    if not messages:
        raise ValueError("messages: must hold at least one")
    return Task(family, split, messages, _objects(content, "tools"), _answer(content.get("answer")), thinking)


def _objects(content: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], ...]:
    value = content.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{name}: must be a list of objects")
    return tuple(value)


def _answer(value: Any) -> str | tuple[Call, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not value:
        raise ValueError("answer: must be a string, or a list of calls with name and arguments")
    calls = []
    for call in value:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["name"], str):
            raise ValueError("answer: each call must have just name and arguments")
        arguments = call["arguments"]
        calls.append(Call(call["name"], json.loads(arguments) if isinstance(arguments, str) else arguments))
    return tuple(calls)
