"""Perplexity of text, scored by the engine: how well a checkpoint predicts what it never saw.

A document is cut into windows that fit the context; each begins afresh, and its first token is given, not scored. So
a number belongs to a window length, and numbers of two checkpoints are compared document by document. Beside the
text's own tokens whole next-token distributions can be compared, with those that another checkpoint kept.
"""

from __future__ import annotations

import json
import math
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...actors.request import Generate, Progress
from ...actors.step_plan import Sampling
from ..crew import work_through
from ..text_lines import open_text
from .distributions import Distributions
from .intervals import Interval, ratio_of_sums

# Plain text has no documents: it is cut between paragraphs into pieces of about this many characters.
PIECE = 6000
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)


class TextError(ValueError):
    """A file of text cannot be used; the message names the file, and the line where there is one."""


class ScoringError(RuntimeError):
    """The engine did not score a window; the message is the engine's."""


class Scorer(Protocol):
    """What an engine's client offers here."""

    def generate(self, request: Generate) -> AsyncIterator[Progress]: ...


class TokenBytes(Protocol):
    """What a tokenizer offers here."""

    def encode(self, text: str, allow_special: bool) -> list[int]: ...
    def token_bytes(self, token: int) -> bytes: ...


@dataclass(frozen=True)
class Document:
    """A piece of text; source says what kind it is."""

    source: str
    text: str


@dataclass(frozen=True)
class Window:
    """Tokens that are scored at once: all but the first, which stand for `size` bytes of document number `document`."""

    document: int
    tokens: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class TextScore:
    """The scored documents: nats, tokens and bytes of each, in the text's order.

    Compared with a reference also: divergences, the sum of KL(reference ‖ this) over a document's positions in nats;
    agreements, at how many of them both find the same token most likely. Both are empty otherwise.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    sizes: tuple[int, ...]
    divergences: tuple[float, ...] = ()
    agreements: tuple[int, ...] = ()

    @property
    def kl(self) -> Interval:
        """KL divergence from the reference in nats a token, over documents. It is never negative, and so is its
        interval; ValueError if nothing was compared."""
        interval = ratio_of_sums(self.divergences, self.tokens)
        return Interval(interval.value, max(0.0, interval.low), interval.high)

    @property
    def top1(self) -> Interval:
        """Share of positions with the reference's most likely token, over documents; ValueError as for `kl`."""
        interval = ratio_of_sums(self.agreements, self.tokens)
        return Interval(interval.value, max(0.0, interval.low), min(1.0, interval.high))

    @property
    def perplexity(self) -> Interval:
        """exp(nats a token), over documents."""
        return ratio_of_sums(self.nats, self.tokens).map(math.exp)

    @property
    def bits_per_byte(self) -> Interval:
        return ratio_of_sums([value / math.log(2) for value in self.nats], self.sizes)

    def ratio_to(self, other: TextScore) -> Interval:
        """Perplexity over another's of the same windows. Pairing leaves only what differs, so this is far more certain
        than either perplexity. Raises ValueError when the windows differ."""
        if self.tokens != other.tokens:
            raise ValueError("perplexities of different windows cannot be compared")
        return ratio_of_sums([a - b for a, b in zip(self.nats, other.nats, strict=True)], self.tokens).map(math.exp)


def read_documents(path: Path) -> Iterator[Document]:
    """Reads text: JSON lines with a field "text" (and perhaps "source") if the name has ".jsonl", else plain text.

    Raises TextError.
    """
    name = path.name
    try:
        with open_text(path) as file:
            if ".jsonl" in path.suffixes:
                yield from _json_documents(name, file)
            else:
                yield from _pieces(name, file)
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror or error}") from None


def _json_documents(name: str, lines: Iterable[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            text, source = content["text"], content.get("source", name)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TextError(f'{name} line {number}: must be a JSON object with a field "text"') from None
        if not isinstance(text, str):
            raise TextError(f"{name} line {number}: text: must be a string")
        yield Document(str(source), text)


def _pieces(name: str, lines: Iterable[str]) -> Iterator[Document]:
    piece: list[str] = []
    size = 0
    for line in lines:
        if size >= PIECE and not line.strip():
            yield Document(name, "".join(piece))
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if "".join(piece).strip():
        yield Document(name, "".join(piece))


def choose(documents: Iterable[Document], size: int) -> list[Document]:
    """Documents of about `size` bytes in all, sources in turns, and of each document at most a source's even share,
    so that a small part of the text has all kinds in it."""
    queues: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        queues[document.source].append(document)
    share = -(-size // max(len(queues), 1))
    chosen: list[Document] = []
    left = size
    for turn in range(max(map(len, queues.values()), default=0)):
        for queue in queues.values():
            if left > 0 and turn < len(queue):
                data = queue[turn].text.encode()[: min(left, share)]
                chosen.append(Document(queue[turn].source, data.decode(errors="ignore")))
                left -= len(data)
    return chosen


def cut_windows(tokenizer: TokenBytes, documents: Sequence[Document], length: int) -> list[Window]:
    """Windows of at most `length` tokens; what is left of a document with fewer than two tokens is not scored."""
    if length < 2:
        raise ValueError(f"windows of {length} tokens have none to score; at least 2 are needed")
    windows = []
    for number, document in enumerate(documents):
        tokens = tokenizer.encode(document.text, allow_special=False)
        for begin in range(0, len(tokens), length):
            part = tuple(tokens[begin : begin + length])
            if len(part) >= 2:
                windows.append(Window(number, part, sum(len(tokenizer.token_bytes(token)) for token in part[1:])))
    return windows


@dataclass(frozen=True)
class WindowScore:
    """What the engine said of one window: a value for every token but the first. divergences and agreements are empty
    unless it compared."""

    logprobs: tuple[float, ...]
    divergences: tuple[float, ...]
    agreements: tuple[bool, ...]


async def score_text(
    scorer: Scorer,
    windows: Sequence[Window],
    *,
    concurrency: int,
    distributions: Distributions | None = None,
    on_window: Callable[[Window], None] | None = None,
) -> TextScore:
    """Scores every window. distributions: where this engine keeps its own, or finds those to compare with. Raises
    ScoringError when the engine refuses or loses one."""
    found: dict[int, WindowScore] = {}

    async def score(number: int) -> None:
        if distributions is None:
            found[number] = await score_window(scorer, windows[number])
        else:
            async with distributions.window(number) as use:
                found[number] = await score_window(scorer, windows[number], keep=use.keep, compare=use.compare)
        if on_window:
            on_window(windows[number])

    await work_through(range(len(windows)), score, concurrency)
    return _by_document(windows, [found[number] for number in range(len(windows))])


def _by_document(windows: Sequence[Window], scores: Sequence[WindowScore]) -> TextScore:
    """Sums over the windows of each document, exact, so that they do not depend on their order."""
    documents: dict[int, list[int]] = defaultdict(list)
    for number, window in enumerate(windows):
        documents[window.document].append(number)
    order = [documents[document] for document in sorted(documents)]
    compared = bool(scores) and bool(scores[0].divergences)
    return TextScore(
        nats=tuple(-math.fsum(value for number in part for value in scores[number].logprobs) for part in order),
        tokens=tuple(sum(len(scores[number].logprobs) for number in part) for part in order),
        sizes=tuple(sum(windows[number].size for number in part) for part in order),
        divergences=tuple(
            math.fsum(value for number in part for value in scores[number].divergences) for part in order if compared
        ),
        agreements=tuple(sum(sum(scores[number].agreements) for number in part) for part in order if compared),
    )


async def score_window(scorer: Scorer, window: Window, *, keep: str = "", compare: str = "") -> WindowScore:
    """Log probabilities of all tokens but the first; keep and compare: as in `Generate`."""
    request = Generate(
        request=f"score-{uuid.uuid4().hex}",
        prompt=window.tokens,
        max_tokens=0,
        sampling=GREEDY,
        stop_tokens=(),
        priority=1,
        score_prompt=True,
        keep=keep,
        compare=compare,
    )
    logprobs: tuple[float, ...] = ()
    divergences: tuple[float, ...] = ()
    agreements: tuple[bool, ...] = ()
    async for progress in scorer.generate(request):
        logprobs += progress.scores
        divergences += progress.divergences
        agreements += progress.agreements
        if progress.finish == "error":
            raise ScoringError(progress.error)
    scored = len(window.tokens) - 1
    if len(logprobs) != scored:
        raise ScoringError(f"the engine gave {len(logprobs)} scores for a window of {len(window.tokens)} tokens")
    compared = scored if compare else 0
    if (len(divergences), len(agreements)) != (compared, compared):
        raise ScoringError(
            f"the engine gave {len(divergences)} divergences and {len(agreements)} agreements for a window of "
            f"{len(window.tokens)} tokens, {compared} are right"
        )
    return WindowScore(logprobs, divergences, agreements)
