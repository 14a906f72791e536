"""What captured decode steps read on a device: one block of memory that each step's numbers are copied to at once.

A step's tokens need not be known to the host: those that the step before sampled are still on the device, and a row
says which of them is its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..kernels.protocol import PagedBatch
from ..kernels.sampling import WORDS
from .step_answer import device_event
from .step_batch import StepBatch

_NUMBERS = 4
"""64-bit numbers a row: the token given by the host, the place of the token to run, position, slot."""
_ROW_BYTES = 8 * (_NUMBERS + WORDS) + 4
"""With how its next token is drawn, and the 32-bit context length."""


class DeviceInputs:
    """For steps of at most `rows` rows and tables of max_pages pages.

    last: [rows] int64 on the device, the tokens that the last step sampled. words: [rows, WORDS] float64 there, as
    `AheadKernels.draw` reads them. Two places on the host take turns, so that one can be written while the other's copy
    is on its way.
    """

    def __init__(self, rows: int, max_pages: int, device: torch.device) -> None:
        self._rows, size = rows, rows * (_ROW_BYTES + 4 * max_pages)
        block = torch.zeros(8 * rows + size, dtype=torch.uint8, device=device)
        self.last = block[: 8 * rows].view(torch.int64)
        # `last` and the given tokens lie one behind the other: a row's place counts through both.
        self._tokens = block[: 16 * rows].view(torch.int64)
        self._block = block[8 * rows :]
        self._numbers, self.words, self._context_len, self._table = _parts(self._block, rows, max_pages)
        self._query_start = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._places = [_HostPlace(rows, max_pages, device) for _ in range(2)]

    def tokens(self, rows: int) -> Tensor:
        """[rows] int64, each row's token."""
        return self._tokens.index_select(0, self._numbers[1, :rows])

    def paged(self, rows: int) -> PagedBatch:
        """Where the first rows stand in the cache; views of what the next steps write."""
        _, _, positions, slots = (each[:rows] for each in self._numbers)
        start, table = self._query_start[: rows + 1], self._table[:rows]
        return PagedBatch(start, self._context_len[:rows], table, positions, slots)

    def take(self, batch: StepBatch, rows: int) -> None:
        """Begins to copy a step's numbers, padded to `rows` rows.

        What pads is a copy of the row with the shortest context: it writes what that row writes, and reads no expert
        that it does not. Without any row it reads the first entry of the cache and is written nowhere, its slot -1.
        """
        place = self._places[0]
        self._places.reverse()
        place.fill(batch, rows, self._rows)
        size = self._rows * _ROW_BYTES + rows * self._table.shape[1] * 4
        self._block[:size].copy_(place.block[:size], non_blocking=True)
        if place.copied is not None:
            place.copied.record()


class _HostPlace:
    """The numbers of one step on the host. copied: the event of its copy's end, None where there is none."""

    def __init__(self, rows: int, max_pages: int, device: torch.device) -> None:
        self.block = torch.zeros(
            rows * (_ROW_BYTES + 4 * max_pages), dtype=torch.uint8, pin_memory=device.type != "cpu"
        )
        self.copied = device_event(device)
        parts = _parts(self.block, rows, max_pages)
        self._numbers, self._words, self._context_len, self._table = (each.numpy() for each in parts)

    def fill(self, batch: StepBatch, rows: int, offset: int) -> None:
        """offset: the place of the first given token. Of a step that is not drawn on the device, and of what pads, the
        largest logits are taken, which takes least."""
        if self.copied is not None:
            self.copied.synchronize()
        count = len(batch.ids)
        given, source, positions, slots = self._numbers
        given[:count], positions[:count], slots[:count] = batch.ids, batch.positions, batch.slots
        source[:count] = np.where(batch.ids < 0, -1 - batch.ids, offset + np.arange(count))
        self._context_len[:count] = batch.lengths
        self._table[:count, : batch.table.shape[1]] = batch.table
        self._words[:rows] = 0.0
        if batch.plain:
            self._words[:count] = batch.words
        if count:
            like = int(self._context_len[:count].argmin())
            self._numbers[:, count:rows] = self._numbers[:, like, None]
            self._context_len[count:rows], self._table[count:rows] = self._context_len[like], self._table[like]
        else:
            self._numbers[:, :rows] = np.array([0, offset, 0, -1])[:, None]
            self._context_len[:rows], self._table[:rows, 0] = 1, 0


def _parts(block: Tensor, rows: int, max_pages: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The numbers [4, rows], words [rows, WORDS], context lengths [rows] and page table [rows, max_pages] of a block of
    bytes."""
    words, lengths, table = 8 * _NUMBERS * rows, 8 * (_NUMBERS + WORDS) * rows, _ROW_BYTES * rows
    return (
        block[:words].view(torch.int64).view(_NUMBERS, rows),
        block[words:lengths].view(torch.float64).view(rows, WORDS),
        block[lengths:table].view(torch.int32),
        block[table:].view(torch.int32).view(rows, max_pages),
    )
