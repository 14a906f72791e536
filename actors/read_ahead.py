"""Reads tensors in the order in which they will be asked for, in a thread of its own, while others are converted.

What is read next to each other is one long read, whichever order the file has it in; how much is read ahead is bounded.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .safetensors_header import CheckpointError, TensorEntry
from .storage import StorageError, read_range

_WINDOW = 8 << 20
"""Bytes that are read before they are handed out."""
_AHEAD = 3
_GAP = 4096  # bytes between two tensors that are rather read than skipped
_ALIGNMENT = 64


@dataclass
class _Run:
    """Parts that lie next to each other in one file. at: where the run begins in the window's buffer."""

    parts: list[tuple[int, str, TensorEntry]]
    at: int

    @property
    def begin(self) -> int:
        return self.parts[0][2].begin

    @property
    def end(self) -> int:
        return max(entry.end for _, _, entry in self.parts)


@dataclass
class _Window:
    """Parts of tensors, in the order in which they will be asked for."""

    parts: list[tuple[str, TensorEntry]] = field(default_factory=list)
    bytes: int = 0


class ReadAhead:
    """`take` hands out each of `tensors` once; best in their order. `close` ends the thread, at any time."""

    def __init__(self, tensors: Iterable[tuple[str, TensorEntry]]) -> None:
        self._windows = [_Window()]
        self._places: dict[str, list[tuple[int, int]]] = {}
        for name, entry in tensors:
            self._plan(name, entry)
        self._changed = threading.Condition()
        self._ready: dict[int, dict[int, Tensor]] = {}
        self._wanted = 0
        self._error: Exception | None = None
        self._closed = False
        self._buffers: deque[np.ndarray] = deque()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def take(self, name: str) -> Iterator[Tensor]:
        """The tensor's rows, in order, in as many parts as it was read in. A part's memory is used again when nobody
        holds the part any more. Raises CheckpointError for what cannot be read."""
        for window, number in self._places.pop(name):
            yield self._part(window, number)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def _plan(self, name: str, entry: TensorEntry) -> None:
        """Cuts a tensor that is larger than a window into parts of whole rows."""
        rows = entry.shape[0] if entry.shape else 1
        step = max(1, _WINDOW * rows // max(1, entry.bytes)) if entry.bytes > _WINDOW else max(1, rows)
        places = self._places[name] = []
        for first in range(0, max(1, rows), step):
            part = entry if step >= rows else entry.rows(first, min(first + step, rows))
            if self._windows[-1].bytes + part.bytes > _WINDOW and self._windows[-1].parts:
                self._windows.append(_Window())
            window = self._windows[-1]
            places.append((len(self._windows) - 1, len(window.parts)))
            window.parts.append((name, part))
            window.bytes += part.bytes

    def _part(self, window: int, number: int) -> Tensor:
        with self._changed:
            if window > self._wanted:
                self._wanted = window
                self._changed.notify_all()
            self._changed.wait_for(lambda: window in self._ready or self._error is not None)
            if window not in self._ready:
                assert self._error is not None
                raise self._error
            parts = self._ready[window]
            tensor = parts.pop(number)
            if not parts:
                del self._ready[window]
            return tensor

    def _run(self) -> None:
        try:
            for number, window in enumerate(self._windows):
                with self._changed:
                    self._changed.wait_for(lambda at=number: self._closed or at <= self._wanted + _AHEAD)
                    if self._closed:
                        return
                tensors = self._read(window)
                with self._changed:
                    self._ready[number] = tensors
                    self._changed.notify_all()
                del tensors
        except Exception as error:  # raised where the tensor is asked for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read(self, window: _Window) -> dict[int, Tensor]:
        runs, size = _runs(window)
        buffer = self._buffer(size)
        lease = buffer[:]  # what the tensors hold; when it goes, the buffer is free again
        weakref.finalize(lease, self._buffers.append, buffer).atexit = False
        data, tensors = torch.from_numpy(lease), {}
        for run in runs:
            _fill(run, buffer.data[run.at : run.at + run.end - run.begin])
            for number, _, entry in run.parts:
                at = run.at + entry.begin - run.begin
                tensors[number] = data[at : at + entry.bytes].view(entry.dtype).view(entry.shape)
        return tensors

    def _buffer(self, size: int) -> np.ndarray:
        """One that is free, or another."""
        for _ in range(len(self._buffers)):
            buffer = self._buffers.popleft()
            if len(buffer) >= size:
                return buffer
        return np.empty(max(size, _WINDOW + (_WINDOW >> 3)), dtype=np.uint8)


def _runs(window: _Window) -> tuple[list[_Run], int]:
    """The window's parts as runs, and the bytes of a buffer for all of them."""
    runs: list[_Run] = []
    size = 0
    order = sorted(enumerate(window.parts), key=lambda part: (str(part[1][1].file), part[1][1].begin))
    for number, (name, entry) in order:
        last = runs[-1] if runs else None
        near = last is not None and last.parts[-1][2].file == entry.file and 0 <= entry.begin - last.end <= _GAP
        if last is not None and near and not (entry.begin - last.begin) % entry.dtype.itemsize:
            last.parts.append((number, name, entry))
        else:
            runs.append(_Run([(number, name, entry)], -(-size // _ALIGNMENT) * _ALIGNMENT))
        size = runs[-1].at + runs[-1].end - runs[-1].begin
    return runs, size


def _fill(run: _Run, target: memoryview) -> None:
    file = run.parts[0][2].file
    try:
        done = read_range(file, run.begin, target)
    except StorageError as error:
        raise CheckpointError(f"{file}: cannot be read for tensor {run.parts[0][1]}: {error}") from error
    at = run.begin + done
    for _, name, entry in run.parts:
        if entry.end > at:
            raise CheckpointError(f"{file}: truncated while reading tensor {name} at byte {max(at, entry.begin)}")
