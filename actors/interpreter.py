"""Runs the colocated stage program of a shard: one small method a kind of stage, buffers by name."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.protocol import ActivationFormat, Activations, Kernels, Sampled
from .calibration import Collector
from .distributions import SliceDistributions
from .exchange import Exchange, ExchangePoint, Received, Sent
from .link import LinkError
from .model.stages import ModelStages, Routing
from .sequence import COLOCATED, Stage, StageKind, StageProgram
from .step_batch import Scored, StepBatch
from .step_plan import NewToken, PromptScores, StageTime

# Rows of logits that are made at once to score a prompt: 128 rows of 163,840 float32 are 84 MB.
SCORED_ROWS = 128
# Where whole distributions are kept or compared: 32 rows of float64 are 42 MB, and there are several of them.
DISTRIBUTION_ROWS = 32

logger = logging.getLogger(__name__)


class StageError(Exception):
    """A stage that failed; the message names it and the layer."""


@dataclass(frozen=True)
class StepAnswer:
    """What one step of a shard gives."""

    tokens: tuple[NewToken, ...]
    scores: tuple[PromptScores, ...]


@dataclass(frozen=True)
class _Logits:
    """values: [S, V] of the sampled rows. scores: of the prompts that are scored."""

    values: Tensor
    scores: tuple[PromptScores, ...]


class Interpreter:
    """Runs a program's stages in order. A stage's inputs are the buffers it reads, its outputs those it writes.

    A shard without tokens in a step runs the stages of the exchange alone: its experts work for the others.
    collector: takes in what runs through the experts, once it is set; to be set between steps.
    """

    def __init__(self, stages: ModelStages, kernels: Kernels, exchange: Exchange, program: StageProgram) -> None:
        self._stages, self._kernels, self._exchange = stages, kernels, exchange
        self.collector: Collector | None = None
        self._actions: dict[StageKind, Callable[..., Any]] = {
            "embed": self._embed,
            "attention": self._attention,
            "dense": self._dense,
            "gate": self._gate,
            "dispatch": self._dispatch,
            "shared": self._shared,
            "experts": self._experts,
            "combine": self._combine,
            "head": self._head,
            "sample": self._sample,
        }
        if program.micro_batches != 1 or COLOCATED not in program.stages:
            raise ValueError(f"program {program.name}: this shard runs colocated programs of one micro-batch")
        self._order = program.stages[COLOCATED]

    def run(self, step: int, batch: StepBatch, times: list[StageTime] | None) -> StepAnswer:
        """Runs one step; with `times` every stage's interval is added to it. Raises StageError."""
        self._step, self._batch = step, batch
        self._exchange.begin_step(step)
        idle = len(batch.tokens) == 0
        buffers: dict[str, Any] = {}
        for stage in self._order:
            if idle and stage.kind not in ("dispatch", "experts"):
                continue
            begin = time.perf_counter_ns()
            self._run_stage(stage, buffers, idle)
            if times is not None:
                times.append(StageTime(stage.name, begin, time.perf_counter_ns()))
        if self.collector is not None:
            self.collector.tokens += len(batch.tokens)
        return StepAnswer((), ()) if idle else buffers[self._order[-1].writes[0]]

    def _run_stage(self, stage: Stage, buffers: dict[str, Any], idle: bool) -> None:
        try:
            inputs = [self._nothing(stage)] if idle and stage.kind == "dispatch" else map(buffers.get, stage.reads)
            output = self._actions[stage.kind](stage, *inputs)
        except Exception as error:
            if not isinstance(error, LinkError):  # a lost or stopping peer says all in its message
                logger.exception("stage %s", stage.name)
            where = f"stage {stage.name}" + (f", layer {stage.layer}" if stage.layer >= 0 else "")
            raise StageError(f"{where}: {type(error).__name__}: {error}") from error
        if stage.writes:
            buffers[stage.writes[0]] = output

    def _point(self, stage: Stage) -> ExchangePoint:
        return ExchangePoint(self._step, stage.layer, stage.micro_batch)

    def _nothing(self, stage: Stage) -> Routing:
        """What the gate of a shard without tokens decides."""
        config = self._stages.config
        rows = torch.empty((0, config.hidden_size))
        ids = torch.empty((0, config.num_experts_per_tok), dtype=torch.int32)
        return Routing(rows, ids, torch.empty(ids.shape), Activations(ActivationFormat.FLOAT, rows, None))

    def _embed(self, stage: Stage) -> Tensor:
        return self._stages.embed(self._batch.tokens)

    def _attention(self, stage: Stage, hidden: Tensor) -> Tensor:
        return self._stages.attention(stage.layer, hidden, self._batch.paged)

    def _dense(self, stage: Stage, hidden: Tensor) -> Tensor:
        return self._stages.dense(stage.layer, hidden)

    def _gate(self, stage: Stage, hidden: Tensor) -> Routing:
        return self._stages.gate(stage.layer, hidden)

    def _dispatch(self, stage: Stage, routing: Routing) -> Sent:
        return self._exchange.dispatch(self._point(stage), routing.activations, routing.ids)

    def _shared(self, stage: Stage, routing: Routing) -> Tensor:
        return self._stages.shared(stage.layer, routing.normed)

    def _experts(self, stage: Stage) -> None:
        point = self._point(stage)
        received = self._exchange.receive_dispatch(point)
        self._exchange.send_back(point, received, self._run_experts(stage.layer, received))

    def _run_experts(self, layer: int, received: Received) -> Tensor:
        if not len(received.pair_token):
            return torch.empty((0, self._stages.config.hidden_size))
        if self.collector is not None:
            self.collector.add(layer, received, self._stages.experts_of(layer))
        return self._stages.experts(layer, received.activations, received.pair_token, received.pair_expert)

    def _combine(self, stage: Stage, hidden: Tensor, routing: Routing, sent: Sent, shared: Tensor) -> Tensor:
        slots = self._exchange.receive_combined(self._point(stage), sent)
        return self._stages.combine(stage.layer, hidden, slots, routing.weights, shared)

    def _head(self, stage: Stage, hidden: Tensor) -> _Logits:
        rows = torch.tensor(self._batch.sampled_rows, dtype=torch.int64)
        logits = self._stages.head(hidden[rows]) if len(rows) else torch.empty((0, self._stages.config.vocab_size))
        answered = [scored for scored in self._batch.scored if scored.targets or scored.keep or scored.compare]
        return _Logits(logits, tuple(self._score(hidden, scored) for scored in answered))

    def _score(self, hidden: Tensor, scored: Scored) -> PromptScores:
        """Log probabilities of a slice's targets, a few rows of logits at a time; distributions if they are wanted."""
        values: list[float] = []
        files = SliceDistributions(scored, self._stages.config.vocab_size)
        step = DISTRIBUTION_ROWS if files.wanted else SCORED_ROWS
        for begin in range(0, len(scored.targets), step):
            targets = torch.tensor(scored.targets[begin : begin + step], dtype=torch.int64)
            first = scored.first_row + begin
            logits = self._stages.head(hidden[first : first + len(targets)])
            values += _logprobs(logits, targets)
            files.take(logits)
        files.end()
        divergences, agreements = tuple(files.divergences), tuple(files.agreements)
        return PromptScores(scored.sequence, scored.start, tuple(values), divergences, agreements, files.error)

    def _sample(self, stage: Stage, logits: _Logits) -> StepAnswer:
        batch = self._batch
        if not batch.sampled:
            return StepAnswer((), logits.scores)
        sampled = self._kernels.sample(logits.values, list(batch.sampling))
        return StepAnswer(_new_tokens(batch, sampled), logits.scores)


def _new_tokens(batch: StepBatch, sampled: Sampled) -> tuple[NewToken, ...]:
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(batch.sampled)
    if sampled.top_tokens.shape[1]:
        best = zip(sampled.top_tokens.tolist(), sampled.top_logprobs.tolist(), batch.sampling, strict=True)
        tops = [tuple(zip(ids, values, strict=True))[: row.top_logprobs] for ids, values, row in best]
    each = zip(batch.sampled, sampled.tokens.tolist(), sampled.logprobs.tolist(), tops, strict=True)
    return tuple(NewToken(*token) for token in each)


def _logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    """Log probabilities at temperature 1 of tokens [S] under logits [S, V]."""
    return logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].tolist()
