"""What a shard does for each kind of stage: one small function a kind, and the values that stages hand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..kernels.protocol import ActivationFormat, Activations, Kernels
from .calibration import Collector
from .captured_step import DecodeInputs
from .device_steps import DeviceRows
from .distributions import SliceDistributions
from .exchange import Exchange, ExchangePoint, Received, Sent
from .gather import Gather
from .model.stages import ModelStages, Routing
from .stage_program import Stage, StageKind
from .step_answer import StepAnswer, new_tokens
from .step_batch import Scored, StepBatch, StepInputs, rows_on
from .step_plan import NewTokens, PromptScores

# Rows of logits that are made at once to score a prompt: 128 rows of 163,840 float32 are 84 MB.
SCORED_ROWS = 128
# Where whole distributions are kept or compared: 32 rows of float64 are 42 MB, and there are several of them.
DISTRIBUTION_ROWS = 32

Links = TypeVar("Links", Exchange, Gather)

Buffers = dict[str, Any]
"""A step's values by name."""

# What parts of a stage hand to each other, one place for all layers: what was received, and what is to be sent.
_SLOTS, _HEADS, _LOGITS = "received slots", "received heads", "received logits"
_OWN_HEADS, _OWN_LOGITS = "own heads", "own logits"


@dataclass(frozen=True)
class Part:
    """A stage's work, or some of it. run: gives what goes into the buffer `into`; "": into the stage's own.

    crosses: whether it sends to other shards, waits for them, or depends on what they send.
    """

    run: Callable[[Stage, Buffers], Any]
    into: str = ""
    crosses: bool = False


StepRows = StepInputs | DecodeInputs | DeviceRows
"""What stages read of a step's rows: their tokens, and where they stand in the cache."""


@dataclass(frozen=True)
class Logits:
    """values: [S, V] of the sampled rows. scores: of the prompts that are scored."""

    values: Tensor
    scores: tuple[PromptScores, ...]


class StageActions(Generic[Links]):
    """The kinds that are alike in all programs. links: what the stages that cross go through.

    Set before a step runs: step, its number; of each micro-batch batches, and inputs, of its rows; every_row: whether
    all rows of `inputs` are sampled, those that pad the batch too. collector: takes in what runs through the experts,
    once it is set. answers: whether the step's answer is told, so that what is kept of it is kept here.
    """

    step: int
    batches: Sequence[StepBatch]
    inputs: Sequence[StepRows]
    every_row: bool
    answers = True

    def __init__(self, stages: ModelStages, kernels: Kernels, links: Links) -> None:
        self.stages, self.kernels, self.links = stages, kernels, links
        self.collector: Collector | None = None
        self.parts: Mapping[StageKind, tuple[Part, ...]] = {
            "embed": (Part(self._embed),),
            "dense": (Part(self._dense),),
            "gate": (Part(self._gate),),
            "shared": (Part(self._shared),),
            "combine": (Part(self._receive_combined, _SLOTS, crosses=True), Part(self._combine)),
            "sample": (Part(self._sample),),
        }

    def nothing(self) -> Routing:
        """What the gate of a shard without tokens decides."""
        config, device = self.stages.config, self.kernels.device
        rows = torch.empty((0, config.hidden_size), dtype=self.kernels.activation_dtype, device=device)
        ids = torch.empty((0, config.num_experts_per_tok), dtype=torch.int32, device=device)
        nothing = Activations(ActivationFormat.FLOAT, rows, None)
        return Routing(rows, nothing, ids, torch.empty(ids.shape, device=device), nothing)

    def _point(self, stage: Stage) -> ExchangePoint:
        return ExchangePoint(self.step, stage.layer, stage.micro_batch)

    def _embed(self, stage: Stage, buffers: Buffers) -> Tensor:
        return self.stages.embed(self.inputs[stage.micro_batch].tokens)

    def _dense(self, stage: Stage, buffers: Buffers) -> Tensor:
        return self.stages.dense(stage.layer, buffers[stage.reads[0]])

    def _gate(self, stage: Stage, buffers: Buffers) -> Routing:
        return self.stages.gate(stage.layer, buffers[stage.reads[0]])

    def _shared(self, stage: Stage, buffers: Buffers) -> Tensor:
        return self.stages.shared(stage.layer, buffers[stage.reads[0]])

    def _receive_combined(self, stage: Stage, buffers: Buffers) -> Tensor:
        return self.links.receive_combined(self._point(stage), buffers[stage.reads[2]])

    def _combine(self, stage: Stage, buffers: Buffers) -> Tensor:
        hidden, routing, _, shared = map(buffers.__getitem__, stage.reads)
        return self.stages.combine(stage.layer, hidden, buffers[_SLOTS], routing.weights, shared)

    def _run_experts(self, layer: int, received: Received) -> Tensor:
        if not len(received.pair_token):
            return torch.empty((0, self.stages.config.hidden_size), device=self.kernels.device)
        if self.collector is not None:
            self.collector.add(layer, received, self.stages.experts_of(layer))
        return self.stages.experts(layer, received.activations, received.pair_token, received.pair_expert)

    def _sampled(self, stage: Stage, hidden: Tensor) -> Tensor:
        """The rows that need logits."""
        rows = self.batches[stage.micro_batch].sampled_rows
        if self.every_row or len(rows) == len(hidden):
            return hidden
        return self.stages.take(hidden, torch.tensor(rows, dtype=torch.int64, device=self.kernels.device))

    def _samples(self, stage: Stage) -> bool:
        """Whether any row needs logits but to be scored."""
        return self.every_row or bool(self.batches[stage.micro_batch].sampled)

    def _no_logits(self) -> Tensor:
        return torch.empty((0, self.stages.config.vocab_size), device=self.kernels.device)

    def _scores(self, stage: Stage, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[PromptScores, ...]:
        """Of all prompts that are scored in this step. head: from rows to their logits."""
        every = self.batches[stage.micro_batch].scored
        answered = [scored for scored in every if scored.targets or scored.keep or scored.compare]
        return tuple(self._score(hidden, scored, head) for scored in answered)

    def _score(self, hidden: Tensor, scored: Scored, head: Callable[[Tensor], Tensor]) -> PromptScores:
        """Log probabilities of a slice's targets, a few rows of logits at a time; distributions if they are wanted."""
        values: list[float] = []
        step = DISTRIBUTION_ROWS if scored.keep or scored.compare else SCORED_ROWS
        told = scored if self.answers else replace(scored, keep="", compare="")
        files = SliceDistributions(told, self.stages.config.vocab_size)
        for begin in range(0, len(scored.targets), step):
            some = scored.targets[begin : begin + step]
            targets = torch.tensor(some, dtype=torch.int64, device=self.kernels.device)
            first = scored.first_row + begin
            logits = head(hidden[first : first + len(targets)])
            values += _logprobs(logits, targets)
            files.take(logits)
        files.end()
        divergences, agreements = tuple(files.divergences), tuple(files.agreements)
        return PromptScores(scored.sequence, scored.start, tuple(values), divergences, agreements, files.error)

    def _sample(self, stage: Stage, buffers: Buffers) -> StepAnswer:
        batch, logits = self.batches[stage.micro_batch], buffers[stage.reads[0]]
        if not batch.sampled:
            return StepAnswer(NewTokens(), logits.scores)
        sampled = self.kernels.sample(logits.values, rows_on(batch.sampling, self.kernels.device))
        return StepAnswer(new_tokens(batch, sampled), logits.scores)


class DataParallelActions(StageActions[Exchange]):
    """A sequence's attention is one shard's, and its rows travel to their experts."""

    def __init__(self, stages: ModelStages, kernels: Kernels, exchange: Exchange) -> None:
        super().__init__(stages, kernels, exchange)
        self.parts = {
            **self.parts,
            "attention": (Part(self._attention),),
            "dispatch": (Part(self._dispatch, crosses=True),),
            "experts": (Part(self._experts, crosses=True),),
            "head": (Part(self._head),),
        }

    def _attention(self, stage: Stage, buffers: Buffers) -> Tensor:
        return self.stages.attention(stage.layer, buffers[stage.reads[0]], self.inputs[stage.micro_batch].paged)

    def _dispatch(self, stage: Stage, buffers: Buffers) -> Sent:
        routing: Routing = buffers[stage.reads[0]]
        return self.links.dispatch(self._point(stage), routing.activations, routing.ids)

    def _experts(self, stage: Stage, buffers: Buffers) -> None:
        point = self._point(stage)
        received = self.links.receive_dispatch(point)
        self.links.send_back(point, received, self._run_experts(stage.layer, received))

    def _head(self, stage: Stage, buffers: Buffers) -> Logits:
        hidden = buffers[stage.reads[0]]
        logits = self.stages.head(self._sampled(stage, hidden)) if self._samples(stage) else self._no_logits()
        return Logits(logits, self._scores(stage, hidden, self.stages.head))


class TensorParallelActions(StageActions[Gather]):
    """Every shard has all rows, and computes its heads, its experts and its part of the logits."""

    def __init__(self, stages: ModelStages, kernels: Kernels, gather: Gather, answers: bool) -> None:
        super().__init__(stages, kernels, gather)
        self.answers = answers
        self.parts = {
            **self.parts,
            "own_heads": (Part(self._own_heads, _OWN_HEADS), Part(self._send_heads, crosses=True)),
            "output": (Part(self._receive_heads, _HEADS, crosses=True), Part(self._output)),
            "own_experts": (Part(self._own_experts, crosses=True),),
            "own_logits": (Part(self._own_logits, _OWN_LOGITS), Part(self._send_logits, crosses=True)),
            "logits": (Part(self._receive_logits, _LOGITS, crosses=True), Part(self._logits)),
        }

    def _own_heads(self, stage: Stage, buffers: Buffers) -> Tensor:
        return self.stages.own_heads(stage.layer, buffers[stage.reads[0]], self.inputs[stage.micro_batch].paged)

    def _send_heads(self, stage: Stage, buffers: Buffers) -> None:
        self.links.send_part(self._point(stage), "heads", buffers[_OWN_HEADS])

    def _receive_heads(self, stage: Stage, buffers: Buffers) -> Tensor:
        return self.links.receive_whole(self._point(stage), "heads")

    def _output(self, stage: Stage, buffers: Buffers) -> Tensor:
        return self.stages.output(stage.layer, buffers[stage.reads[0]], buffers[_HEADS])

    def _own_experts(self, stage: Stage, buffers: Buffers) -> Sent:
        point, routing = self._point(stage), buffers[stage.reads[0]]
        received = self.links.own_pairs(point, routing.activations, routing.ids)
        return self.links.send_outputs(point, received, self._run_experts(stage.layer, received))

    def _own_logits(self, stage: Stage, buffers: Buffers) -> Tensor:
        return (
            self.stages.head(self._sampled(stage, buffers[stage.reads[0]]))
            if self._samples(stage)
            else self._no_logits()
        )

    def _send_logits(self, stage: Stage, buffers: Buffers) -> None:
        if self._samples(stage):
            self.links.send_part(self._point(stage), "logits", buffers[_OWN_LOGITS])

    def _receive_logits(self, stage: Stage, buffers: Buffers) -> Tensor:
        if self._samples(stage):
            return self.links.receive_whole(self._point(stage), "logits")
        return self._no_logits()

    def _logits(self, stage: Stage, buffers: Buffers) -> Logits:
        def head(rows: Tensor) -> Tensor:
            """All shards score the same rows in the same order."""
            self.links.send_part(point, "logits", self.stages.head(rows))
            return self.links.receive_whole(point, "logits")

        point = self._point(stage)
        return Logits(buffers[_LOGITS], self._scores(stage, buffers[stage.reads[0]], head))


def _logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    """Log probabilities at temperature 1 of tokens [S] under logits [S, V]."""
    return logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].tolist()
