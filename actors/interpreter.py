"""Runs the stage program of a shard: its stages in order, part by part, as they are or captured."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor

from ..kernels.protocol import AheadKernels, JoiningKernels
from .calibration import Collector
from .captured_step import CapturedStep, CapturedSteps, DecodeInputs, can_capture, static_copy
from .device_steps import DeviceRows, DeviceSteps, padded_rows
from .exchange import Exchange
from .link import LinkError
from .sequence import COLOCATED, Stage, StageProgram
from .stage_actions import Buffers, Part, StageActions
from .step_answer import Answer, Answered, StageError, StepAnswer, joined
from .step_batch import StepBatch
from .step_plan import StageTime

# Where a captured step that draws its tokens keeps them.
_SAMPLED = "sampled"
# A layer whose experts take several operations runs as many of them as its tokens choose: no graph records that.
_OF_EXPERTS = ("dispatch", "experts", "own_experts", "combine")

logger = logging.getLogger(__name__)


class Interpreter:
    """Runs a program's stages in order. A stage's inputs are the buffers it reads, its outputs those it writes.

    A shard without tokens in a step runs the stages of the exchange alone: its experts work for the others. With
    tensor-parallel attention no shard has tokens then. Decode steps are captured and replayed unless they are timed or
    collected. On a device they are begun while the one before runs.
    """

    def __init__(self, actions: StageActions, *programs: StageProgram, fixed: Exchange | None = None) -> None:
        """actions: of the programs' kinds of stages. programs: the first one, of one micro-batch, is run unless a step
        names another. fixed: an exchange for steps that have the same number of rows on
        all shards, for kernels that leave out what pads them (`AheadKernels.leaves_out`)."""
        self._actions, self._stages = actions, actions.stages
        kernels = self._kernels = actions.kernels
        self._varying, self._fixed = actions.links, fixed
        # By whether the step draws its tokens too: `StepBatch.plain`.
        self._captured: dict[bool, CapturedSteps[DecodeInputs]] = {plain: CapturedSteps() for plain in (True, False)}
        self._device = DeviceSteps(kernels, self._stages.max_pages) if isinstance(kernels, AheadKernels) else None
        self._changes = self._stages.changes
        if programs[0].micro_batches != 1 or any(COLOCATED not in program.stages for program in programs):
            names = ", ".join(program.name for program in programs)
            raise ValueError(f"programs {names}: a shard runs colocated ones, the first of one micro-batch")
        self._order = programs[0].stages[COLOCATED]
        self._split = {program.name: program for program in programs[1:]}

    @property
    def collector(self) -> Collector | None:
        """Takes in what runs through the experts, once it is set; to be set between steps."""
        return self._actions.collector

    @collector.setter
    def collector(self, collector: Collector | None) -> None:
        self._actions.collector = collector

    @property
    def runs_ahead(self) -> bool:
        """Whether decode steps may be begun before the one before them is done."""
        return self._device is not None and self.collector is None

    def run(self, step: int, batch: StepBatch, times: list[StageTime] | None) -> StepAnswer:
        """`begin` and `wait` for a shard that is alone."""
        return self.begin(step, batch, len(batch.ids) if can_capture(batch) else 0, times).wait()

    def begin(
        self, step: int, batch: StepBatch, decode_rows: int, times: list[StageTime] | None, program: str = ""
    ) -> Answer:
        """Runs one step, or has a device run it; with `times` every stage's interval is added to it. Raises StageError.
        program: which one, if not the first; it is run stage by stage.

        decode_rows: as in `StepPlan`. At most two steps may be on their way, and only one of them before a batch that
        waits for no token of it.
        """
        captures = times is None and self.collector is None
        device = self._device if captures and padded_rows(decode_rows) and program not in self._split else None
        actions = self._actions
        actions.links = self._fixed if device is not None and self._fixed is not None else self._varying
        actions.step, actions.batches, actions.every_row = step, (batch,), False
        actions.links.begin_step(step)
        if program in self._split:
            split = self._split[program]
            actions.batches = batch.split(split.micro_batches)
            return Answered(self._run_all(split.stages[COLOCATED], times))
        if device is not None and (len(batch.ids) or self._fixed is not None):
            return self._begin(device, batch, decode_rows)
        if captures and self._device is None and can_capture(batch):
            return Answered(self._decode(batch))
        return Answered(self._run_all(self._order, times))

    def _begin(self, device: DeviceSteps, batch: StepBatch, decode_rows: int) -> Answer:
        """A decode step on the device."""
        self._forget_changed()
        rows = padded_rows(decode_rows if self._fixed is not None else len(batch.ids))
        self._actions.every_row = True
        device.take(batch, rows)
        step = device.captured.find(rows)
        with _named_all(f"decode step of {rows} rows"):
            if step is None:
                step = CapturedStep(self._kernels, device.inputs(rows), device.captured.last)
                self._capture_on(device, step)
                device.captured.keep(rows, step)
            else:
                self._actions.inputs = (step.inputs,)  # for kernels that run a captured function again
                step.run()
            return device.answer(step, batch)

    def _capture_on(self, device: DeviceSteps, step: CapturedStep[DeviceRows]) -> None:
        """Runs a decode step, from its tokens to the next ones, and records it."""
        self._actions.inputs = (step.inputs,)
        *stages, sample = self._order
        step.compute(partial(device.load, step.inputs))
        self._record(step, stages)
        step.compute(lambda: device.sample(step, step.buffers[sample.reads[0]].values))
        step.end()

    def _run_all(self, stages: Sequence[Stage], times: list[StageTime] | None) -> StepAnswer:
        """Stage by stage; of micro-batches without rows the exchange alone."""
        actions, buffers = self._actions, Buffers()
        actions.inputs = [batch.on(self._kernels.device) for batch in actions.batches]
        idle = [len(batch.ids) == 0 for batch in actions.batches]
        order = [stage for stage in stages if not idle[stage.micro_batch] or stage.kind in ("dispatch", "experts")]
        for stage in order:
            if idle[stage.micro_batch] and stage.reads:
                buffers[stage.reads[0]] = actions.nothing()
        if times is None and self.collector is None and isinstance(self._kernels, JoiningKernels):
            self._run_joined(self._kernels, order, buffers)
        else:
            for stage in order:
                begin = time.perf_counter_ns()
                for part in self._actions.parts[stage.kind]:
                    _run_part(part, stage, buffers)
                if times is not None:
                    times.append(StageTime(stage.name, begin, time.perf_counter_ns()))
        if self.collector is not None:
            self.collector.tokens += sum(len(batch.ids) for batch in actions.batches)
        return joined([buffers[stage.writes[0]] for stage in order if stage.kind == "sample"])

    def _run_joined(self, kernels: JoiningKernels, order: Sequence[Stage], buffers: Buffers) -> None:
        """Parts that only compute are handed to the kernels together."""
        parts = [(part, stage) for stage in order for part in self._actions.parts[stage.kind]]
        for computes, group in groupby(parts, lambda each: self._computes(*each)):
            some = list(group)

            def run(some: list[tuple[Part, Stage]] = some) -> None:
                for part, stage in some:
                    _run_part(part, stage, buffers)

            with _named_all(f"stages {some[0][1].name} to {some[-1][1].name}"):
                kernels.joined(run) if computes else run()

    def _computes(self, part: Part, stage: Stage) -> bool:
        """Whether it is kernels alone, whatever the values that it reads."""
        if part.crosses:
            return self._records_crossing(stage)
        scores = stage.kind in ("head", "logits") and self._actions.batches[stage.micro_batch].scored
        return stage.kind != "sample" and not scores

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
                self._actions.inputs = (step.inputs,)  # for kernels that run a captured function again
                step.inputs.take(batch)
                step.run()
        if batch.plain:
            return step.inputs.answer(batch.sampled)
        for part in self._actions.parts[sample.kind]:
            _run_part(part, sample, step.buffers)
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
        inputs = DecodeInputs(len(batch.ids), self._stages.max_pages)
        self._actions.inputs = (inputs,)
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
            logits = step.buffers[sample.reads[0]].values
            step.buffers[_SAMPLED] = self._kernels.sample(logits, step.inputs.sampling)

    def _record(self, step: CapturedStep[Any], stages: Sequence[Stage]) -> None:
        """Adds stages to a captured step."""
        for stage in stages:
            for part in self._actions.parts[stage.kind]:
                if not part.crosses or self._records_crossing(stage):
                    step.compute(partial(_run_part, part, stage, step.buffers))
                else:
                    step.between(partial(_run_part, part, stage, step.buffers, stays=True))

    def _records_crossing(self, stage: Stage) -> bool:
        """Whether what the stage sends and receives can be recorded, and one operation runs the layer's experts
        whatever tokens choose."""
        if not self._actions.links.captures:
            return False
        return stage.kind not in _OF_EXPERTS or len(self._stages.experts_of(stage.layer).blocks) == 1


def _run_part(part: Part, stage: Stage, buffers: Buffers, stays: bool = False) -> None:
    """stays: a tensor goes where the part's last one is, for a graph reads it there."""
    with _named(stage):
        output = part.run(stage, buffers)
    name = part.into or "".join(stage.writes)
    if stays and isinstance(output, Tensor):
        place = f"{name} that stays"  # what a graph makes for another layer has the same name
        output = buffers[place] = static_copy(buffers.get(place), output)
    if name:
        buffers[name] = output


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
