"""A decode step that was captured: what the kernels compute between two exchanges is run again by one call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..kernels.protocol import Graph, Kernels, PagedBatch, Sampled, SamplingRow
from ..kernels.sampling import SamplingRows
from .running_rows import RunningRows
from .step_answer import StepAnswer
from .step_batch import StepBatch
from .step_plan import NewTokens

Inputs = TypeVar("Inputs")

# Above this many rows a step computes for so long that calling the kernels one by one costs nothing.
CAPTURED_ROWS = 64
# Steps of so many different numbers of rows are kept, those used last.
KEPT_STEPS = 32


def can_capture(batch: StepBatch) -> bool:
    """Whether every row is one sequence's next token and is sampled: all such steps of T rows compute the same."""
    return batch.decodes and len(batch.ids) <= CAPTURED_ROWS


class DecodeInputs:
    """What a captured step reads on the CPU: tensors that stay, into which each step's numbers are written.

    tokens, paged: as in `StepInputs`, with a page table for max_pages, of which each step writes what it needs.
    sampling: how tokens are drawn, where the step is plain (`StepBatch`); what it draws is read here too.
    """

    def __init__(self, rows: int, max_pages: int) -> None:
        numbers = torch.zeros((3, rows), dtype=torch.int64)
        self.tokens, positions, slots = numbers
        context_len = torch.zeros(rows, dtype=torch.int32)
        page_table = torch.full((rows, max_pages), -1, dtype=torch.int32)
        query_start = torch.arange(rows + 1, dtype=torch.int32)
        self.paged = PagedBatch(query_start, context_len, page_table, positions, slots)
        self.sampling = SamplingRows([SamplingRow(0.0, 1.0, 0, 0, 0)] * rows)
        self._numbers, self._context_len, self._table = numbers.numpy(), context_len.numpy(), page_table.numpy()
        self._rows: RunningRows | None = None
        self._turn = 0

    def take(self, batch: StepBatch) -> None:
        """Writes a step's numbers, of its pages what is new."""
        rows = batch.rows
        follows = rows is not None and rows is self._rows and rows.turn == self._turn + 1
        self._numbers[:] = batch.numbers
        self._context_len[:] = self._numbers[1] + 1
        if rows is None or not follows:
            table = batch.pages.rows(batch.places)
            self._table[:, : table.shape[1]] = table
        else:
            for row, page in rows.gained:
                self._table[row, rows.positions[row] // batch.pages.page_size] = page
        if batch.plain:
            if rows is None or not follows:
                self.sampling.put(batch.sampling)
            elif rows.draws:
                self.sampling.move([position + 1 for position in rows.positions.tolist()])
        self._rows, self._turn = rows, 0 if rows is None else rows.turn

    def drawn(self, sampled: Sampled) -> None:
        """From now on every run leaves its tokens in these tensors."""
        self._drawn, self._logprobs = sampled.tokens.numpy().data, sampled.logprobs.numpy().data

    def answer(self, sequences: tuple[int, ...]) -> StepAnswer:
        """What the last run has drawn for these sequences."""
        return StepAnswer(NewTokens(sequences, tuple(self._drawn.tolist()), tuple(self._logprobs.tolist())), ())


class CapturedStep(Generic[Inputs]):
    """Built while the step runs for the first time: parts in their order, each computed by kernels alone or not.

    inputs: what it reads. buffers: the stages' results by name; their tensors stay. beside: a step that never runs at
    the same time, whose memory this one may share.
    """

    def __init__(self, kernels: Kernels, inputs: Inputs, beside: CapturedStep[Inputs] | None = None) -> None:
        self.inputs = inputs
        self.buffers: dict[str, Any] = {}
        self._kernels = kernels
        self._pending: list[Callable[[], None]] = []
        self._parts: list[Callable[[], None]] = []
        self._last: Graph[dict[str, Any]] | None = None if beside is None else beside._last

    def compute(self, part: Callable[[], None]) -> None:
        """Adds a part that kernels alone compute. It runs with those after it, at the latest at `end`."""
        self._pending.append(part)

    def between(self, part: Callable[[], None]) -> None:
        """Runs a part that cannot be captured, now and in every step."""
        self._capture()
        part()
        self._parts.append(part)

    def end(self) -> None:
        """Runs what is left; the step is complete."""
        alone = not self._parts
        self._capture()
        if alone and self._parts and self._last is not None:  # no other part replaces what the buffers hold
            self._parts = [self._last.replay]

    def run(self) -> None:
        """Runs the step again, for what `inputs` holds now."""
        for part in self._parts:
            part()

    def _capture(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return

        written: list[str] = []  # by the first run; a later one may find there the tensor that it puts there

        def run() -> dict[str, Any]:
            """Gives what it has written: a later layer's values go by the same names, and what runs between must find
            this layer's."""
            before = dict(self.buffers)
            for part in pending:
                part()
            if not written:
                written.extend(name for name, value in self.buffers.items() if before.get(name) is not value)
            return {name: self.buffers[name] for name in written}

        self._last = graph = self._kernels.capture(run, beside=self._last)

        def replay() -> None:
            graph.replay()
            self.buffers.update(graph.result)

        self._parts.append(replay)


class CapturedSteps(Generic[Inputs]):
    """The captured steps of one shard by their number of rows, the last used ones."""

    def __init__(self) -> None:
        self._steps: OrderedDict[int, CapturedStep[Inputs]] = OrderedDict()

    @property
    def last(self) -> CapturedStep[Inputs] | None:
        """The step used last."""
        return next(reversed(self._steps.values()), None)

    def find(self, rows: int) -> CapturedStep[Inputs] | None:
        """The step of so many rows if it is here."""
        step = self._steps.get(rows)
        if step is not None:
            self._steps.move_to_end(rows)
        return step

    def keep(self, rows: int, step: CapturedStep[Inputs]) -> None:
        """Keeps a complete step, and drops the one not used for the longest time if there are too many."""
        self._steps[rows] = step
        if len(self._steps) > KEPT_STEPS:
            self._steps.popitem(last=False)

    def clear(self) -> None:
        """Drops all: the weights that they read are no longer the model's."""
        self._steps.clear()


def static_copy(place: Tensor | None, values: Tensor) -> Tensor:
    """`values` in a tensor that stays: in `place`, or in a new one for the first step."""
    return values.clone() if place is None else place.copy_(values)
