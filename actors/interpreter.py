"""Runs the colocated stage program of a shard: one small method a kind of stage, buffers by name."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..kernels.protocol import ActivationFormat, Activations, AheadKernels, JoiningKernels, Kernels
from .calibration import Collector
from .captured_step import CapturedStep, CapturedSteps, DecodeInputs, can_capture, static_copy
from .device_steps import DeviceRows, DeviceSteps, padded_rows
from .distributions import SliceDistributions
from .exchange import Exchange, ExchangePoint, Received, Sent
from .link import LinkError
from .model.stages import ModelStages, Routing
from .sequence import COLOCATED, Stage, StageKind, StageProgram
from .step_answer import Answer, Answered, StageError, StepAnswer, new_tokens
from .step_batch import Scored, StepBatch, rows_on
from .step_plan import PromptScores, StageTime

# Rows of logits that are made at once to score a prompt: 128 rows of 163,840 float32 are 84 MB.
SCORED_ROWS = 128
# Where whole distributions are kept or compared: 32 rows of float64 are 42 MB, and there are several of them.
DISTRIBUTION_ROWS = 32

# Where a captured step keeps what the layer's experts answered; one place for all layers.
_SLOTS = "slots"
# Where one that draws its tokens keeps them.
_SAMPLED = "sampled"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Logits:
    """values: [S, V] of the sampled rows. scores: of the prompts that are scored."""

    values: Tensor
    scores: tuple[PromptScores, ...]


class Interpreter:
    """Runs a program's stages in order. A stage's inputs are the buffers it reads, its outputs those it writes.

    A shard without tokens in a step runs the stages of the exchange alone: its experts work for the others.
    collector: takes in what runs through the experts, once it is set; to be set between steps. Decode steps are
    captured and replayed unless they are timed or collected. On a device they are begun while the one before runs.
    """

    def __init__(
        self,
        stages: ModelStages,
        kernels: Kernels,
        exchange: Exchange,
        program: StageProgram,
        fixed: Exchange | None = None,
    ) -> None:
        """fixed: an exchange for steps that have the same number of rows on all shards, for kernels that leave out
        what pads them (`AheadKernels.leaves_out`)."""
        self._stages, self._kernels, self._exchange = stages, kernels, exchange
        self._varying, self._fixed = exchange, fixed
        self.collector: Collector | None = None
        # By whether the step draws its tokens too: `StepBatch.plain`.
        self._captured: dict[bool, CapturedSteps[DecodeInputs]] = {plain: CapturedSteps() for plain in (True, False)}
        self._device = DeviceSteps(kernels, stages.max_pages) if isinstance(kernels, AheadKernels) else None
        self._changes = stages.changes
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

    @property
    def runs_ahead(self) -> bool:
        """Whether decode steps may be begun before the one before them is done."""
        return self._device is not None and self.collector is None

    def run(self, step: int, batch: StepBatch, times: list[StageTime] | None) -> StepAnswer:
        """`begin` and `wait` for a shard that is alone."""
        return self.begin(step, batch, len(batch.ids) if can_capture(batch) else 0, times).wait()

    def begin(self, step: int, batch: StepBatch, decode_rows: int, times: list[StageTime] | None) -> Answer:
        """Runs one step, or has a device run it; with `times` every stage's interval is added to it. Raises StageError.

        decode_rows: as in `StepPlan`. At most two steps may be on their way, and only one of them before a batch that
        waits for no token of it.
        """
        captures = times is None and self.collector is None
        device = self._device if captures and padded_rows(decode_rows) else None
        self._exchange = self._fixed if device is not None and self._fixed is not None else self._varying
        self._step, self._batch = step, batch
        self._exchange.begin_step(step)
        if device is not None and (len(batch.ids) or self._fixed is not None):
            return self._begin(device, batch, decode_rows)
        if captures and self._device is None and can_capture(batch):
            return Answered(self._decode(batch))
        return Answered(self._run_all(batch, times))

    def _begin(self, device: DeviceSteps, batch: StepBatch, decode_rows: int) -> Answer:
        """A decode step on the device."""
        self._forget_changed()
        rows = padded_rows(decode_rows if self._fixed is not None else len(batch.ids))
        device.take(batch, rows)
        step = device.captured.find(rows)
        with _named_all(f"decode step of {rows} rows"):
            if step is None:
                step = CapturedStep(self._kernels, device.inputs(rows), device.captured.last)
                self._capture_on(device, step)
                device.captured.keep(rows, step)
            else:
                self._inputs = step.inputs  # for kernels that run a captured function again
                step.run()
            return device.answer(step, batch)

    def _capture_on(self, device: DeviceSteps, step: CapturedStep[DeviceRows]) -> None:
        """Runs a decode step, from its tokens to the next ones, and records it."""
        self._inputs = step.inputs
        *stages, head, _ = self._order
        step.compute(partial(device.load, step.inputs))
        self._record(step, stages)
        step.compute(lambda: device.sample(step, self._stages.head(step.buffers[head.reads[0]])))
        step.end()

    def _run_all(self, batch: StepBatch, times: list[StageTime] | None) -> StepAnswer:
        """Stage by stage."""
        self._inputs = batch.on(self._kernels.device)
        idle = len(batch.ids) == 0
        buffers: dict[str, Any] = {}
        order = [stage for stage in self._order if not idle or stage.kind in ("dispatch", "experts")]
        if times is None and self.collector is None and isinstance(self._kernels, JoiningKernels):
            for computes, stages in groupby(order, self._computes):
                part = tuple(stages)
                run = partial(self._run_stages, part, buffers, idle)
                with _named_all(f"stages {part[0].name} to {part[-1].name}"):
                    self._kernels.joined(run) if computes else run()
        else:
            self._run_stages(order, buffers, idle, times)
        if self.collector is not None:
            self.collector.tokens += len(batch.ids)
        return StepAnswer((), ()) if idle else buffers[self._order[-1].writes[0]]

    def _run_stages(
        self, stages: Sequence[Stage], buffers: dict[str, Any], idle: bool, times: list[StageTime] | None = None
    ) -> None:
        for stage in stages:
            begin = time.perf_counter_ns()
            self._run_stage(stage, buffers, idle)
            if times is not None:
                times.append(StageTime(stage.name, begin, time.perf_counter_ns()))

    def _computes(self, stage: Stage) -> bool:
        """Whether the stage is kernels alone, whatever the values that it reads."""
        if stage.kind in ("dispatch", "experts", "combine"):
            return self._records_exchange(stage.layer)
        return stage.kind != "sample" and not (stage.kind == "head" and self._batch.scored)

    def _decode(self, batch: StepBatch) -> StepAnswer:
        """A step of one token a sequence: captured when it is the first of its number of rows, else replayed."""
        self._forget_changed()
        rows, sample, captured = len(batch.ids), self._order[-1], self._captured[batch.plain]
        step = captured.find(rows)
        with _named_all(f"decode step of {rows} rows"):
            if step is None:
                step = self._capture(batch)
                captured.keep(rows, step)
            else:
                self._inputs = step.inputs  # for kernels that run a captured function again
                step.inputs.take(batch)
                step.run()
        if batch.plain:
            return step.inputs.answer(batch.sampled)
        self._run_stage(sample, step.buffers, idle=False)
        return step.buffers[sample.writes[0]]

    def _forget_changed(self) -> None:
        """Drops what was captured with experts that are no longer the model's."""
        if self._changes != self._stages.changes:
            for captured in self._captured.values():
                captured.clear()
            if self._device is not None:
                self._device.captured.clear()
            self._changes = self._stages.changes

    def _capture(self, batch: StepBatch) -> CapturedStep[DecodeInputs]:
        """Runs all stages, and records them; the last one only where tokens are drawn of the logits as they are."""
        self._inputs = inputs = DecodeInputs(len(batch.ids), self._stages.max_pages)
        inputs.take(batch)
        step = CapturedStep(self._kernels, inputs)
        *stages, sample = self._order
        self._record(step, stages)
        if batch.plain:
            step.compute(partial(self._draw, step, sample))
        step.end()
        if batch.plain:
            inputs.drawn(step.buffers[_SAMPLED])
        return step

    def _draw(self, step: CapturedStep[DecodeInputs], sample: Stage) -> None:
        """The sample stage of a captured step."""
        with _named(sample):
            logits: _Logits = step.buffers[sample.reads[0]]
            step.buffers[_SAMPLED] = self._kernels.sample(logits.values, step.inputs.sampling)

    def _record(self, step: CapturedStep[Any], stages: Sequence[Stage]) -> None:
        """Adds stages to a captured step."""
        for stage in stages:
            run = partial(self._run_stage, stage, step.buffers, False)
            if stage.kind not in ("dispatch", "experts", "combine") or self._records_exchange(stage.layer):
                step.compute(run)
            elif stage.kind == "combine":
                step.between(partial(self._receive, stage, step.buffers))
                step.compute(partial(self._combine_received, stage, step.buffers))
            else:
                step.between(run)

    def _records_exchange(self, layer: int) -> bool:
        """Whether the layer's exchange can be recorded, and one operation runs its experts whatever tokens choose."""
        return self._exchange.captures and len(self._stages.experts_of(layer).blocks) == 1

    def _run_stage(self, stage: Stage, buffers: dict[str, Any], idle: bool) -> None:
        with _named(stage):
            inputs = [self._nothing(stage)] if idle and stage.kind == "dispatch" else map(buffers.get, stage.reads)
            output = self._actions[stage.kind](stage, *inputs)
        if stage.writes:
            buffers[stage.writes[0]] = output

    def _receive(self, stage: Stage, buffers: dict[str, Any]) -> None:
        """The part of a combine stage that waits: leaves the slots where `_combine_received` finds them."""
        with _named(stage):
            slots = self._exchange.receive_combined(self._point(stage), buffers[stage.reads[2]])
            buffers[_SLOTS] = static_copy(buffers.get(_SLOTS), slots)

    def _combine_received(self, stage: Stage, buffers: dict[str, Any]) -> None:
        with _named(stage):
            hidden, routing, _, shared = map(buffers.__getitem__, stage.reads)
            combined = self._stages.combine(stage.layer, hidden, buffers[_SLOTS], routing.weights, shared)
        buffers[stage.writes[0]] = combined

    def _point(self, stage: Stage) -> ExchangePoint:
        return ExchangePoint(self._step, stage.layer, stage.micro_batch)

    def _nothing(self, stage: Stage) -> Routing:
        """What the gate of a shard without tokens decides."""
        config, device = self._stages.config, self._kernels.device
        rows = torch.empty((0, config.hidden_size), dtype=self._kernels.activation_dtype, device=device)
        ids = torch.empty((0, config.num_experts_per_tok), dtype=torch.int32, device=device)
        nothing = Activations(ActivationFormat.FLOAT, rows, None)
        return Routing(rows, nothing, ids, torch.empty(ids.shape, device=device), nothing)

    def _embed(self, stage: Stage) -> Tensor:
        return self._stages.embed(self._inputs.tokens)

    def _attention(self, stage: Stage, hidden: Tensor) -> Tensor:
        return self._stages.attention(stage.layer, hidden, self._inputs.paged)

    def _dense(self, stage: Stage, hidden: Tensor) -> Tensor:
        return self._stages.dense(stage.layer, hidden)

    def _gate(self, stage: Stage, hidden: Tensor) -> Routing:
        return self._stages.gate(stage.layer, hidden)

    def _dispatch(self, stage: Stage, routing: Routing) -> Sent:
        return self._exchange.dispatch(self._point(stage), routing.activations, routing.ids)

    def _shared(self, stage: Stage, routing: Routing) -> Tensor:
        return self._stages.shared(stage.layer, routing)

    def _experts(self, stage: Stage) -> None:
        point = self._point(stage)
        received = self._exchange.receive_dispatch(point)
        self._exchange.send_back(point, received, self._run_experts(stage.layer, received))

    def _run_experts(self, layer: int, received: Received) -> Tensor:
        if not len(received.pair_token):
            return torch.empty((0, self._stages.config.hidden_size), device=self._kernels.device)
        if self.collector is not None:
            self.collector.add(layer, received, self._stages.experts_of(layer))
        return self._stages.experts(layer, received.activations, received.pair_token, received.pair_expert)

    def _combine(self, stage: Stage, hidden: Tensor, routing: Routing, sent: Sent, shared: Tensor) -> Tensor:
        slots = self._exchange.receive_combined(self._point(stage), sent)
        return self._stages.combine(stage.layer, hidden, slots, routing.weights, shared)

    def _head(self, stage: Stage, hidden: Tensor) -> _Logits:
        rows, device = self._batch.sampled_rows, self._kernels.device
        if len(rows) < len(hidden):
            chosen = torch.tensor(rows, dtype=torch.int64, device=device)
            sampled = self._stages.take(hidden, chosen) if rows else hidden[:0]
        else:
            sampled = hidden
        logits = self._stages.head(sampled) if rows else torch.empty((0, self._stages.config.vocab_size), device=device)
        answered = [scored for scored in self._batch.scored if scored.targets or scored.keep or scored.compare]
        return _Logits(logits, tuple(self._score(hidden, scored) for scored in answered))

    def _score(self, hidden: Tensor, scored: Scored) -> PromptScores:
        """Log probabilities of a slice's targets, a few rows of logits at a time; distributions if they are wanted."""
        values: list[float] = []
        files = SliceDistributions(scored, self._stages.config.vocab_size)
        step = DISTRIBUTION_ROWS if files.wanted else SCORED_ROWS
        for begin in range(0, len(scored.targets), step):
            some = scored.targets[begin : begin + step]
            targets = torch.tensor(some, dtype=torch.int64, device=self._kernels.device)
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
        sampled = self._kernels.sample(logits.values, rows_on(batch.sampling, self._kernels.device))
        return StepAnswer(new_tokens(batch, sampled), logits.scores)


@contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Errors become a StageError that names the stage."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, LinkError):  # a lost or stopping peer says all in its message
            logger.exception("stage %s", stage.name)
        where = f"stage {stage.name}" + (f", layer {stage.layer}" if stage.layer >= 0 else "")
        raise StageError(f"{where}: {type(error).__name__}: {error}") from error


@contextmanager
def _named_all(what: str) -> Iterator[None]:
    """What kernels refuse that run for many stages becomes a StageError."""
    try:
        yield
    except ValueError as error:
        logger.exception(what)
        raise StageError(f"{what}: {error}") from error


def _logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    """Log probabilities at temperature 1 of tokens [S] under logits [S, V]."""
    return logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].tolist()
