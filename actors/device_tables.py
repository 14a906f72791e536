"""The page tables of decoding sequences on a device, where each step only what is new is copied to."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from .page_table import PageTable
from .running_rows import RunningRows
from .step_answer import device_event


class DeviceTables:
    """A line for each sequence that decodes, as long as it is among the rows of every step; for `rows` of them.

    lines: [rows + 1, max_pages] int32 on the device; the last one, `idle`, has page 0, for steps without rows. Behind a
    sequence's pages is what was left there. What is written comes, in the device's order, after what steps on their way
    read. Two places on the host take turns, so that one can be written while the other's copy is on its way.
    """

    def __init__(self, rows: int, max_pages: int, device: torch.device) -> None:
        self.idle = rows
        self.lines = torch.zeros((rows + 1, max_pages), dtype=torch.int32, device=device)
        self._cells = torch.zeros(rows, dtype=torch.int64, device=device)
        self._pages = torch.zeros(rows, dtype=torch.int32, device=device)
        self._places = [_HostPlace(rows, max_pages, device) for _ in range(2)]
        self._free = list(range(rows))
        self._line_of: dict[int, int] = {}
        self._known = np.zeros(rows, np.int64)
        self._rows: RunningRows | None = None
        self._turn = 0
        self._lines = np.zeros(0, np.int64)

    def take(self, rows: RunningRows, pages: PageTable) -> np.ndarray:
        """Begins to copy what the next step's rows need and is not there yet; returns the lines, [R] int64."""
        if rows is self._rows and rows.turn == self._turn + 1:
            changed: Iterable[int] = [row for row, _ in rows.gained]
        else:
            self._lines = self._lines_of(rows.sequences)
            changed = (self._known[self._lines] < pages.counts[rows.places]).nonzero()[0].tolist()
        self._rows, self._turn = rows, rows.turn
        if changed:
            self._copy([(int(self._lines[row]), int(rows.places[row])) for row in changed], pages)
        return self._lines

    def _lines_of(self, sequences: tuple[int, ...]) -> np.ndarray:
        """Gives lines to those that have none, and takes those of all others back."""
        before = self._line_of
        here = self._line_of = {number: before.pop(number, -1) for number in sequences}
        self._free.extend(before.values())
        for number, line in here.items():
            if line < 0:
                here[number] = line = self._free.pop()
                self._known[line] = 0
        return np.array([*here.values()], np.int64)

    def _copy(self, changed: Iterable[tuple[int, int]], pages: PageTable) -> None:
        """What is new of these lines and their sequences' places: single pages in one go, more of them line by line."""
        host = self._places[0]
        self._places.reverse()
        host.wait()
        width, cells = self.lines.shape[1], 0
        for line, place in changed:
            known, count = int(self._known[line]), int(pages.counts[place])
            new = pages.of(place, known, count)
            if len(new) == 1:
                host.cell_numbers[cells], host.page_numbers[cells] = line * width + known, new[0]
                cells += 1
            else:
                host.line_numbers[line, known:count] = new
                self.lines[line, known:count].copy_(host.lines[line, known:count], non_blocking=True)
            self._known[line] = count
        if cells:
            self._cells[:cells].copy_(host.cells[:cells], non_blocking=True)
            self._pages[:cells].copy_(host.pages[:cells], non_blocking=True)
            self.lines.view(-1).index_copy_(0, self._cells[:cells], self._pages[:cells])
        host.end()


class _HostPlace:
    """What one step copies: places of all lines, counted through, their pages, and whole lines; each as a tensor and
    as an array of the same memory."""

    def __init__(self, rows: int, max_pages: int, device: torch.device) -> None:
        pinned = device.type != "cpu"
        self.cells = torch.zeros(rows, dtype=torch.int64, pin_memory=pinned)
        self.pages = torch.zeros(rows, dtype=torch.int32, pin_memory=pinned)
        self.lines = torch.zeros((rows, max_pages), dtype=torch.int32, pin_memory=pinned)
        self.cell_numbers, self.page_numbers, self.line_numbers = (
            each.numpy() for each in (self.cells, self.pages, self.lines)
        )
        self._copied = device_event(device)

    def wait(self) -> None:
        """Until the last copy from here has ended."""
        if self._copied is not None:
            self._copied.synchronize()

    def end(self) -> None:
        """All that is copied from here has been begun."""
        if self._copied is not None:
            self._copied.record()
