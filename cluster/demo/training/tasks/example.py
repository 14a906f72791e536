"""What a scored example is, and which operands are held out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import chat
from ..phrases import digest

SPLITS = ("train", "operands", "phrasings", "tools")
HELDOUT_OPERANDS = 20  # one key in so many


@dataclass(frozen=True)
class Draft:
    """A task before it becomes a conversation.

    ``key`` names the operands (empty: never held out), ``thought`` the steps of thinking, ``by_letters`` says that the
    answer is best written one letter a token, ``is_hard`` that it takes the steps of thinking to know it. A task of
    several turns brings its own ``messages`` up to the assistant's answer, and a tool's task ``tools`` and ``calls``.
    """

    key: str
    question: str
    thought: str
    answer: str
    by_letters: bool = False
    is_hard: bool = False
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    calls: tuple[Mapping[str, Any], ...] = ()
    heldout_tool: bool = False


@dataclass(frozen=True)
class Example:
    """A conversation up to the point where the assistant answers, and the answer expected.

    ``answer`` is the exact content expected; ``calls`` are the tool calls expected instead, as OpenAI's ``tool_calls``.
    """

    family: str
    split: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    thinking: bool
    thought: str
    answer: str
    calls: tuple[Mapping[str, Any], ...] = ()
    by_letters: bool = False
    prompt: str = field(default="")

    @property
    def completion(self) -> str:
        """What the model writes after the prompt, up to the end of its turn."""
        said = self.answer + chat.calls_text(self.calls) + chat.END
        return self.thought + chat.THINK_END + said if self.thinking else said

    @property
    def expected(self) -> str | list[dict[str, Any]]:
        """The answer as stored in files: the content, or the calls as name and arguments."""
        return wanted_calls(self.calls) if self.calls else self.answer


def wanted_calls(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls as ``{"name", "arguments"}`` with the arguments' JSON text."""
    return [dict(call["function"]) for call in calls]


def rendered(example: Example) -> Example:
    """The example with its prompt text."""
    return replace(example, prompt=chat.render(example.messages, example.tools, example.thinking))


def is_heldout_key(family: str, key: str) -> bool:
    """Whether operands are held out; an empty key never is."""
    return bool(key) and digest("operands", family, key) % HELDOUT_OPERANDS == 0
