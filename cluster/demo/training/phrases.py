"""A small grammar of phrasings: frames with alternatives, politeness, case and punctuation; some are held out.

A frame is text with slots and alternatives, ``"[What is|What's] {a} [plus|+] {b}?"``; alternatives nest. Drawing one
alternative everywhere gives a *phrasing*. A phrasing is held out by a hash of its words, or with its whole frame by a
hash of the frame; the basic frames of a task are never held out. Politeness, case and end punctuation are added
afterwards.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
FREE_TEXT_END = re.compile(r"\{(text|note|word|list)\}[.?!]?$")
HELDOUT_PHRASINGS = 9  # one phrasing in so many
HELDOUT_FRAMES = 12  # one frame in so many, all its phrasings
SLOT = re.compile(r"(\{\w*\})")
SLANG = (
    ("What's", "whats"), ("what's", "whats"), ("What is", "whats"), ("what is", "whats"), ("you ", "u "),
    ("please", "pls"),
    ("Please", "pls"), ("Thanks", "thx"), ("thanks", "thx"), ("I'm", "im"),
)  # fmt: skip
SLANG_SHARE = 0.06
CAPITALS_SHARE = 0.03
SPACE_SHARE = 0.04
PLAIN_SHARE = 0.45
BASIC_SHARE = 0.3

ORDER_PREFIXES = (
    "please ", "Please ", "can you ", "Can you ", "could you ", "Could you please ", "I want you to ", "I need you to ",
    "now ", "Hi, ", "hello, ", "Hello! ", "hey, ", "Please help me: ", "Task: ", "would you ", "ok, ",
    "Next, ", "Kindly ",
)  # fmt: skip
QUESTION_PREFIXES = (
    "Hi, ", "Hello! ", "hey, ", "Question: ", "Quick question: ", "tell me, ", "So, ", "Please tell me: ",
    "ok, ", "Now: ",
    "I wonder, ", "Can you help? ", "Next question: ", "and ", "Please: ", "Hmm, ", "Q: ", "Do you know, ",
)  # fmt: skip
SUFFIXES = (
    " Thanks.",
    " thanks",
    " please",
    ", please.",
    " Thank you!",
    " Please answer.",
    " Answer briefly.",
    " :)",
    " Thanks a lot!",
)


@dataclass(frozen=True)
class Frames:
    """The frames of one question: ``basic`` ones are always trained on, phrasings of ``more`` may be held out."""

    basic: tuple[str, ...]
    more: tuple[str, ...] = ()


def digest(*parts: str) -> int:
    """A stable 32-bit hash of some strings."""
    return int.from_bytes(hashlib.md5("\x1f".join(parts).encode()).digest()[:4], "big")


def expand(rng: random.Random, frame: str) -> str:
    """Draws one alternative in every bracket, innermost first."""
    while "[" in frame:
        frame = ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), frame)
    return frame


def is_heldout_frame(frame: str) -> bool:
    """Whether a frame is held out with all its phrasings."""
    return digest("frame", frame) % HELDOUT_FRAMES == 0


def is_heldout_phrasing(phrasing: str) -> bool:
    """Whether a phrasing is held out; case, spaces and punctuation do not count."""
    return digest("phrasing", *words_of(phrasing)) % HELDOUT_PHRASINGS == 0


def every(frame: str) -> tuple[str, ...]:
    """All phrasings of a frame."""
    match = ALTERNATIVES.search(frame)
    if not match:
        return (frame,)
    parts = (frame[: match.start()] + option + frame[match.end() :] for option in match[1].split("|"))
    return tuple(dict.fromkeys(phrasing for part in parts for phrasing in every(part)))


def words_of(phrasing: str) -> tuple[str, ...]:
    """A phrasing's words: case, spaces and punctuation do not count."""
    return tuple(re.findall(r"\w+|[-+*/:]", phrasing.lower()))


Groups = tuple[tuple[str, ...], ...]


def parted_by(frames: Frames, out: Sequence[bool]) -> tuple[Groups, Groups]:
    """The phrasings to train on and the others, where the frames marked ``out`` are held out as a whole."""
    groups = [every(frame) for frame in frames.more]
    pairs = list(zip(groups, out, strict=True))
    kept = [tuple(p for p in group if not (gone or is_heldout_phrasing(p))) for group, gone in pairs]
    seen = {words_of(p) for group in (*kept, *map(every, frames.basic)) for p in group}
    held = [tuple(p for p in group if words_of(p) not in seen) for group in groups]
    return tuple(filter(None, kept)), tuple(filter(None, held))


@cache
def parted(frames: Frames) -> tuple[Groups, Groups]:
    """The phrasings of ``more`` to train on and those held out, frame by frame; at least one frame has some."""
    out = [is_heldout_frame(frame) for frame in frames.more]
    trained, held = parted_by(frames, out)
    if not held and len(out) > 1:
        trained, held = parted_by(frames, [*out[:-1], True])
    return trained, held


def draw(rng: random.Random, frames: Frames, heldout: bool) -> str:
    """Draws a phrasing, slots still open, that is held out or is not, as asked."""
    if not frames.more or (not heldout and rng.random() < BASIC_SHARE):
        return expand(rng, rng.choice(frames.basic))
    trained, held = parted(frames)
    choices = held if heldout else trained
    return rng.choice(rng.choice(choices)) if choices else expand(rng, rng.choice(frames.basic))


def lowered(phrasing: str) -> str:
    """The phrasing with a small first letter, unless it starts with a slot or with the word I."""
    if phrasing[:1] == "{" or re.match(r"I\b|[A-Z]{2}", phrasing):
        return phrasing
    return phrasing[:1].lower() + phrasing[1:]


def dress(rng: random.Random, phrasing: str) -> str:
    """Adds politeness before or after, changes case, drops or changes the end punctuation."""
    if rng.random() < PLAIN_SHARE:
        return phrasing
    is_order = phrasing.endswith(".")
    choice = rng.random()
    if choice < 0.35:
        prefix = rng.choice(ORDER_PREFIXES if is_order else QUESTION_PREFIXES)
        phrasing = prefix + (lowered(phrasing) if rng.random() < 0.8 else phrasing)
        if is_order and re.match(r"(?i)(can|could|would) ", prefix) and rng.random() < 0.7:
            phrasing = phrasing[:-1] + "?"
    elif choice < 0.5 and not FREE_TEXT_END.search(phrasing):
        suffix = rng.choice(SUFFIXES)
        phrasing = phrasing.rstrip(".?") + suffix if suffix[1].islower() or suffix[0] == "," else phrasing + suffix
    if rng.random() < 0.3:
        phrasing = phrasing.lower()
    if rng.random() < 0.35:
        phrasing = phrasing.rstrip(".?!")
    elif is_order and rng.random() < 0.15:
        phrasing = phrasing.rstrip(".") + rng.choice(("!", ":", ""))
    return phrasing


def typed(rng: random.Random, phrasing: str) -> str:
    """Sometimes short forms of the net, capitals throughout, or a space too many; slots stay as they are."""
    chance = rng.random()
    if chance < SLANG_SHARE:
        for plain, short in SLANG:
            phrasing = phrasing.replace(plain, short)
    elif chance < SLANG_SHARE + CAPITALS_SHARE:
        parts = SLOT.split(phrasing)
        phrasing = "".join(part if part[:1] == "{" else part.upper() for part in parts)
    return phrasing + " " if rng.random() < SPACE_SHARE else phrasing


@dataclass(frozen=True)
class Speaker:
    """Puts questions into words for one example: a source of randomness, and whether to use held-out phrasings."""

    rng: random.Random
    heldout: bool = False

    def say(self, frames: Frames, **slots: object) -> str:
        """A phrasing of ``frames``, dressed, its slots filled."""
        return typed(self.rng, dress(self.rng, draw(self.rng, frames, self.heldout))).format(**slots)

    def ask_about(self, body: str, frames: Frames, **slots: object) -> str:
        """A question about a text: the text first or the question first."""
        question = self.say(frames, **slots)
        gap = self.rng.choice(("\n", "\n", "\n\n", " "))
        if self.rng.random() < 0.65:
            body = self.rng.choice(("", "", "", "Text: ", "Data: ", "Here is my list: ", "Given: ")) + body
            return body + gap + question
        return question + self.rng.choice((gap, ": ", "\n")) + body


def listing(rng: random.Random, items: list[str]) -> str:
    """Items in a row: commas, spaces, lines or a closing "and"."""
    style = rng.random()
    if style < 0.4:
        return ", ".join(items)
    if style < 0.58:
        return " ".join(items)
    if style < 0.74 and len(items) > 1:
        return ", ".join(items[:-1]) + rng.choice((" and ", ", and ", ", ")) + items[-1]
    if style < 0.8:
        return " and ".join(items)
    return rng.choice((",", "; ", "\n", " , ", " - ")).join(items) if style < 0.95 else "[" + ", ".join(items) + "]"
