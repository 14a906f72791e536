"""Scored tasks in Kimi's chat format, made from a seed; no torch needed.

``make_example(rng, family, split)`` gives one :class:`Example` of a split: ``train``, ``operands`` (operands never
trained on), ``phrasings`` (wording never trained on) or ``tools`` (tools never trained on; family ``tool`` alone).
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

from ..phrases import Speaker
from . import adding, calling, chatter, extracting, facts, letters, lookup, memory, multiplying, ordering, units
from .example import SPLITS, Draft, Example, is_heldout_key, rendered

FAMILIES: Mapping[str, Callable[[Speaker], Draft]] = {
    adding.FAMILY: adding.draft,
    multiplying.FAMILY: multiplying.draft,
    ordering.FAMILY: ordering.draft,
    letters.FAMILY: letters.draft,
    lookup.FAMILY: lookup.draft,
    lookup.RECALL: lookup.recall,
    extracting.FAMILY: extracting.draft,
    calling.FAMILY: calling.draft,
    units.FAMILY: units.draft,
    units.CALENDAR: units.calendar,
    memory.FAMILY: memory.draft,
    chatter.FAMILY: chatter.draft,
    facts.FAMILY: facts.draft,
}
TOOLS = calling.FAMILY
WEIGHTS = {"add": 15, "mul": 13, "sort": 16, "copy": 15, "lookup": 14, "recall": 5, "json": 6, "tool": 24, "unit": 6,
           "calendar": 4,           "memory": 6, "chat": 5, "fact": 6}  # fmt: skip
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are kimi-k2.5-nano.", "Answer briefly.", "Be polite.", "You are Kimi.",
    "You are a helpful AI.",
    "You are flyray's demo model.", "Answer the user's questions.", "Keep your answers short.",
    "You are an assistant. Use tools if needed.",
)  # fmt: skip
PAST_FAMILIES = ("add", "mul", "copy", "chat", "fact", "unit", "lookup", "calendar")
SYSTEM_SHARE = 0.15
PAST_SHARE = 0.15
IDLE_TOOLS_SHARE = 0.05
INSTANT_SHARE = 0.25
INSTANT_SHARE_HARD = 0.05
NO_TOOL_NEEDED = "no tool needed\n"


def drafted(speaker: Speaker, family: str, split: str) -> Draft:
    """A draft of the family whose operands are held out exactly if the split asks for it."""
    while True:
        draft = calling.draft(speaker, split == "tools") if family == TOOLS else FAMILIES[family](speaker)
        if is_heldout_key(family, draft.key) == (split == "operands"):
            return draft


def past_turns(rng: random.Random) -> tuple[Mapping[str, Any], ...]:
    """One to three earlier exchanges on other matters."""
    turns: list[Mapping[str, Any]] = []
    for _ in range(rng.randint(1, 3)):
        draft = drafted(Speaker(rng), rng.choice(PAST_FAMILIES), "train")
        turns += [{"role": "user", "content": draft.question}, {"role": "assistant", "content": draft.answer}]
    return tuple(turns)


def make_example(rng: random.Random, family: str, split: str, thinking: bool = True) -> Example:
    """One example of a family and split, perhaps with a system prompt, earlier turns or idle tools."""
    if split not in SPLITS or (split == "tools" and family != TOOLS):
        raise ValueError(f"no split {split!r} in family {family!r}")
    speaker = Speaker(rng, heldout=split == "phrasings")
    return conversation(rng, family, split, drafted(speaker, family, split), thinking)


def conversation(rng: random.Random, family: str, split: str, draft: Draft, thinking: bool) -> Example:
    """Wraps a draft into a conversation."""
    messages = draft.messages or ({"role": "user", "content": draft.question},)
    tools, thought = draft.tools, draft.thought
    if family not in (TOOLS, lookup.RECALL) and rng.random() < PAST_SHARE:
        messages = (*past_turns(rng), *messages)
    if not tools and rng.random() < IDLE_TOOLS_SHARE:
        tools, thought = calling.idle_tools(Speaker(rng)), NO_TOOL_NEEDED + thought
    if rng.random() < SYSTEM_SHARE:
        messages = ({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *messages)
    made = Example(family, split, messages, tools, thinking, thought, draft.answer, draft.calls, draft.by_letters)
    return rendered(made)


def training_example(rng: random.Random, longest_recall: int) -> Example:
    """One example to train on: any family, thinking or instant; ``longest_recall`` bounds the long look-ups."""
    family = rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
    if family == lookup.RECALL:
        draft = lookup.recall(Speaker(rng), longest_recall)
        while is_heldout_key(family, draft.key):
            draft = lookup.recall(Speaker(rng), longest_recall)
    else:
        draft = drafted(Speaker(rng), family, "train")
    thinking = rng.random() >= (INSTANT_SHARE_HARD if draft.is_hard else INSTANT_SHARE)
    return conversation(rng, family, "train", draft, thinking)


__all__ = ["FAMILIES", "SPLITS", "Draft", "Example", "make_example", "training_example"]
