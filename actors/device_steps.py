"""Decode steps on a device: captured by their number of rows, begun while the one before them runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.protocol import AheadKernels, Drawn, PagedBatch
from .captured_step import CapturedStep, CapturedSteps
from .device_inputs import DeviceInputs
from .step_answer import Answer, Answered, AnswerPlace, StepAnswer, new_tokens
from .step_batch import StepBatch, rows_on

# Numbers of rows that are captured: up to a limit the multiples of a unit.
_SIZES = ((8, 1), (64, 8), (256, 32), (512, 64))
MAX_ROWS = _SIZES[-1][0]

# Where a captured step leaves the head's logits and what is drawn of them.
_LOGITS, _DRAWN = "device logits", "device drawn"


def padded_rows(rows: int) -> int:
    """The rows of the captured step that runs `rows` rows; 0 if there are too many for one."""
    return next((-(-rows // unit) * unit for limit, unit in _SIZES if rows <= limit), 0)


@dataclass
class DeviceRows:
    """What one captured step reads: tokens [T] int64 and where they stand, set when the step begins, and how the next
    ones are drawn, words [T, WORDS]."""

    rows: int
    paged: PagedBatch
    tokens: Tensor
    words: Tensor


class DeviceSteps:
    """One shard's. A step's tokens come from the host, or from the step before; those that it draws stay for the next
    one and are copied to the host, where nobody needs to wait for them but who reads them.

    One row whose logits are changed, or of which more is told than its token's probability (`StepBatch.plain`), makes
    all rows of its step wait for the host."""

    def __init__(self, kernels: AheadKernels, max_pages: int) -> None:
        self._kernels, device = kernels, kernels.device
        self._inputs = DeviceInputs(MAX_ROWS, max_pages, device)
        self._answers = [AnswerPlace(MAX_ROWS, device) for _ in range(2)]
        self.captured: CapturedSteps[DeviceRows] = CapturedSteps()

    def inputs(self, rows: int) -> DeviceRows:
        """What a step of so many rows reads; always the same memory."""
        return DeviceRows(rows, self._inputs.paged(rows), self._inputs.tokens(rows), self._inputs.words[:rows])

    def take(self, batch: StepBatch, rows: int) -> None:
        """Begins to bring a step's numbers to the device, padded to `rows` rows."""
        self._inputs.take(batch, rows)

    def load(self, inputs: DeviceRows) -> None:
        """A captured step's first part: what its rows run, and their page tables."""
        inputs.tokens, inputs.paged = self._inputs.tokens(inputs.rows), self._inputs.paged(inputs.rows)

    def sample(self, step: CapturedStep[DeviceRows], logits: Tensor) -> None:
        """A captured step's last part."""
        step.buffers[_LOGITS], step.buffers[_DRAWN] = logits, self._kernels.draw(logits, step.inputs.words)

    def answer(self, step: CapturedStep[DeviceRows], batch: StepBatch) -> Answer:
        """What a step that has been begun gives. Rows that are not plain are waited for."""
        drawn: Drawn = step.buffers[_DRAWN]
        if not batch.plain:
            logits = step.buffers[_LOGITS][: len(batch.sampled)]
            sampled = self._kernels.sample(logits, rows_on(batch.sampling, self._kernels.device))
            return Answered(StepAnswer(new_tokens(batch, sampled), ()))
        self._inputs.last[: len(drawn.tokens)].copy_(drawn.tokens)
        self._answers.reverse()
        return self._answers[0].answer(drawn, batch.sampled)
