"""What one step of a shard gives, at once or when its device has computed it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.protocol import Drawn, Sampled
from .step_batch import StepBatch
from .step_plan import NewTokens, PromptScores, Top


class StageError(Exception):
    """A stage that failed; the message names it and the layer."""


@dataclass(frozen=True)
class StepAnswer:
    """What one step of a shard gives."""

    tokens: NewTokens
    scores: tuple[PromptScores, ...]


class Answer(Protocol):
    """A step's answer, on its way or here."""

    @property
    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        ...

    def wait(self) -> StepAnswer:
        """The answer; raises StageError for logits of which no token can be taken."""
        ...


@dataclass(frozen=True)
class Answered:
    """An answer that is here."""

    answer: StepAnswer
    ready = True

    def wait(self) -> StepAnswer:
        return self.answer


class AnswerPlace:
    """Memory of the host to which a device copies the tokens of at most `rows` rows, one step's at a time."""

    def __init__(self, rows: int, device: torch.device) -> None:
        pinned = device.type != "cpu"
        self._tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=pinned)
        self._numbers = torch.zeros((2, rows), dtype=torch.float32, pin_memory=pinned)
        self._event = device_event(device)

    def answer(self, drawn: Drawn, sequences: tuple[int, ...]) -> Answer:
        """The answer of the step that was begun last: `drawn`, of which the first rows are of these sequences."""
        for here, there in zip(
            (self._tokens, *self._numbers), (drawn.tokens, drawn.logprobs, drawn.largest), strict=True
        ):
            here[: len(there)].copy_(there, non_blocking=True)
        if self._event is not None:
            self._event.record()
        return _OnItsWay(sequences, self._event, self._tokens, self._numbers)


@dataclass(frozen=True)
class _OnItsWay:
    sequences: tuple[int, ...]
    event: torch.Event | None
    tokens: Tensor
    numbers: Tensor

    @property
    def ready(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> StepAnswer:
        if self.event is not None:
            self.event.synchronize()
        count = len(self.sequences)
        tokens, (logprobs, largest) = self.tokens[:count].tolist(), self.numbers[:, :count].tolist()
        if not all(map(math.isfinite, largest)):
            row, value = next((row, value) for row, value in enumerate(largest) if not math.isfinite(value))
            raise StageError(f"sample: the largest of logits row {row} is {value}, expected a finite number")
        return StepAnswer(NewTokens(self.sequences, tuple(tokens), tuple(logprobs)), ())


def device_event(device: torch.device) -> torch.Event | None:
    """An event of the device's work; None where torch computes in step with the host."""
    accelerated = device.type != "cpu" and torch.accelerator.is_available()
    return torch.Event(device) if accelerated else None


def new_tokens(batch: StepBatch, sampled: Sampled) -> NewTokens:
    """The tokens of a step's sampled sequences; waits for the device."""
    tops: tuple[Top, ...] = ()
    if sampled.top_tokens.shape[1]:
        best = zip(sampled.top_tokens.tolist(), sampled.top_logprobs.tolist(), batch.samplers, strict=True)
        tops = tuple(tuple(zip(ids, values, strict=True))[: sampler.top_logprobs] for ids, values, sampler in best)
    faults: tuple[tuple[int, str], ...] = ()
    if not batch.plain:
        faulty = zip(batch.sampled, batch.samplers, strict=True)
        faults = tuple((sequence, sampler.fault) for sequence, sampler in faulty if sampler.fault)
    return NewTokens(batch.sampled, tuple(sampled.tokens.tolist()), tuple(sampled.logprobs.tolist()), tops, faults)


def joined(parts: Sequence[StepAnswer]) -> StepAnswer:
    """The answers of a step's parts as one."""
    if len(parts) == 1:
        return parts[0]
    tops: list[Top] = []
    if any(part.tokens.tops for part in parts):
        for part in parts:
            tops.extend(part.tokens.tops or [()] * len(part.tokens.tokens))
    tokens = NewTokens(
        tuple(chain.from_iterable(part.tokens.sequences for part in parts)),
        tuple(chain.from_iterable(part.tokens.tokens for part in parts)),
        tuple(chain.from_iterable(part.tokens.logprobs for part in parts)),
        tuple(tops),
        tuple(chain.from_iterable(part.tokens.faults for part in parts)),
    )
    return StepAnswer(tokens, tuple(chain.from_iterable(part.scores for part in parts)))
