"""What is measured in turns: engines in several formats, and peers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

Texts = tuple[tuple[int, ...], ...]


class BenchError(RuntimeError):
    """A measurement failed; the message says why."""


class BenchUsageError(ValueError):
    """What was asked for cannot be measured; the message says what is missing."""


@dataclass(frozen=True)
class Sizes:
    """batches: sequences that decode at once. prefill: tokens of a prompt. decode: tokens of each sequence that
    decodes, after such a prompt."""

    batches: tuple[int, ...]
    prefill: int
    decode: int


@dataclass(frozen=True)
class Round:
    """One round of one variant. decode: tokens a second of all sequences together, by batch. prefill: prompt tokens a
    second of one prompt. step_ms: median milliseconds of a decode step, by batch, and texts: prompt and answer of every
    sequence, where they are known."""

    decode: Mapping[int, float]
    prefill: float
    step_ms: Mapping[int, float] = field(default_factory=dict)
    texts: Mapping[int, Texts] = field(default_factory=dict)


class Variant(Protocol):
    """Something that decodes and prefills, ready to be measured."""

    async def measure(self, sizes: Sizes) -> Round:
        """One round. Raises BenchError."""
        ...
