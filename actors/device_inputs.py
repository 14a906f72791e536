"""What captured decode steps read on a device: a block of memory that each step's numbers are copied to at once, and
the page tables of the sequences that run.

A step's tokens need not be known to the host: those that the step before sampled are still on the device, and a row
says which of them is its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..kernels.protocol import PagedBatch
from ..kernels.sampling import WORDS
from .device_tables import DeviceTables
from .running_rows import RunningRows
from .step_answer import device_event
from .step_batch import StepBatch

_NUMBERS = 5
"""64-bit numbers a row: the token given by the host, position, slot, the place of the token to run, and the line of the
page table."""
_ROW_BYTES = 8 * (_NUMBERS + WORDS) + 4
"""With how its next token is drawn, and the 32-bit context length."""


class DeviceInputs:
    """For steps of at most `rows` rows and tables of max_pages pages.

    last: [rows] int64 on the device, the tokens that the last step sampled. words: [rows, WORDS] float64 there, as
    `AheadKernels.draw` reads them. Two places on the host take turns, so that one can be written while the other's copy
    is on its way.
    """

    def __init__(self, rows: int, max_pages: int, device: torch.device) -> None:
        self._rows = rows
        block = torch.zeros((8 + _ROW_BYTES) * rows, dtype=torch.uint8, device=device)
        self.last = block[: 8 * rows].view(torch.int64)
        # `last` and the given tokens lie one behind the other: a row's place counts through both.
        self._tokens = block[: 16 * rows].view(torch.int64)
        self._block = block[8 * rows :]
        self._numbers, self.words, self._context_len = _parts(self._block, rows)
        self._query_start = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._places = [_HostPlace(rows, device) for _ in range(2)]
        self._tables = DeviceTables(rows, max_pages, device)

    def tokens(self, rows: int) -> Tensor:
        """[rows] int64, each row's token."""
        return self._tokens.index_select(0, self._numbers[3, :rows])

    def paged(self, rows: int) -> PagedBatch:
        """Where the first rows stand in the cache; but for the page table views of what the next steps write."""
        _, positions, slots, _, lines = (each[:rows] for each in self._numbers)
        table = self._tables.lines.index_select(0, lines)
        return PagedBatch(self._query_start[: rows + 1], self._context_len[:rows], table, positions, slots)

    def take(self, batch: StepBatch, rows: int) -> None:
        """Begins to copy a step's numbers, padded to `rows` rows. The step decodes alone (`StepBatch.rows`).

        What pads is a copy of the row with the shortest context: it writes what that row writes, and reads no expert
        that it does not. Without any row it reads the first entry of the cache and is written nowhere, its slot -1.
        """
        running = batch.rows
        assert running is not None
        place = self._places[0]
        self._places.reverse()
        if len(running):
            place.fill(running, self._tables.take(running, batch.pages), rows, self._rows)
        else:
            place.idle(rows, self._rows, self._tables.idle)
        self._block.copy_(place.block, non_blocking=True)
        if place.copied is not None:
            place.copied.record()


class _HostPlace:
    """The numbers of one step on the host. copied: the event of its copy's end, None where there is none."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.block = torch.zeros(_ROW_BYTES * rows, dtype=torch.uint8, pin_memory=device.type != "cpu")
        self.copied = device_event(device)
        self._numbers, self._words, self._context_len = (each.numpy() for each in _parts(self.block, rows))
        self._in_order = np.arange(rows)

    def fill(self, running: RunningRows, lines: np.ndarray, rows: int, offset: int) -> None:
        """offset: the place of the first given token. Of a step that is not drawn on the device, and of what pads, the
        largest logits are taken, which takes least."""
        if self.copied is not None:
            self.copied.synchronize()
        count = len(running)
        ids = running.tokens
        self._numbers[:3, :count] = running.numbers
        self._numbers[3, :count] = np.where(ids < 0, -1 - ids, self._in_order[:count] + offset)
        self._numbers[4, :count] = lines
        self._context_len[:count] = running.positions + 1
        self._words[:rows] = 0.0
        if running.plain:
            self._words[:count] = running.words()
        if count < rows:
            like = int(running.positions.argmin())
            self._numbers[:, count:rows] = self._numbers[:, like, None]
            self._context_len[count:rows] = self._context_len[like]

    def idle(self, rows: int, offset: int, line: int) -> None:
        """The numbers of a step without rows."""
        if self.copied is not None:
            self.copied.synchronize()
        self._numbers[:, :rows] = np.array((0, 0, -1, offset, line))[:, None]
        self._context_len[:rows] = 1
        self._words[:rows] = 0.0


def _parts(block: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers [5, rows], words [rows, WORDS] and context lengths [rows] of a block of bytes."""
    words, lengths = 8 * _NUMBERS * rows, 8 * (_NUMBERS + WORDS) * rows
    return (
        block[:words].view(torch.int64).view(_NUMBERS, rows),
        block[words:lengths].view(torch.float64).view(rows, WORDS),
        block[lengths:].view(torch.int32),
    )
