"""Reads bytes of source tensors, from local files or through fsspec, with each file opened once; ahead of the work."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from ...actors.safetensors_header import CheckpointError, TensorEntry
from ...actors.storage import StorageError, read_range, reason

T = TypeVar("T")
_OPEN_FILES = 64


class SourceReader:
    """A context manager that holds the descriptors of up to 64 local files."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, name: str, entry: TensorEntry) -> Tensor:
        """The whole tensor. Raises CheckpointError if the file no longer holds it."""
        data = torch.empty(entry.bytes // entry.dtype.itemsize, dtype=entry.dtype)
        if entry.bytes:
            self._read_into(name, entry, data.view(torch.uint8).numpy().data)
        return data.reshape(entry.shape)

    def read_bytes(self, name: str, entry: TensorEntry, low: int, high: int) -> memoryview:
        """Bytes low..high of the tensor."""
        data = torch.empty(high - low, dtype=torch.uint8).numpy().data
        self._read_into(name, replace(entry, begin=entry.begin + low, end=entry.begin + high), data)
        return data

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_into(self, name: str, entry: TensorEntry, target: memoryview) -> None:
        try:
            if isinstance(entry.file, Path):
                done = self._pread(entry.file, entry.begin, target)
            else:
                done = read_range(entry.file, entry.begin, target)
        except (OSError, StorageError) as error:
            raise CheckpointError(f"{entry.file}: reading tensor {name} failed: {reason(error)}") from error
        if done < len(target):
            raise CheckpointError(f"{entry.file}: truncated while reading tensor {name} at byte {entry.begin + done}")

    def _pread(self, file: Path, begin: int, target: memoryview) -> int:
        """Returns how many bytes there were."""
        descriptor, done = self._descriptor(file), 0
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], begin + done)
            if not count:
                break
            done += count
        return done

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            if len(self._open) == _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(file, os.O_RDONLY)
        self._open.move_to_end(file)
        return self._open[file]


def rows_of(entry: TensorEntry, low: int, high: int) -> TensorEntry:
    """The part of a tensor that its rows low..high are."""
    row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    return replace(
        entry,
        shape=(high - low, *entry.shape[1:]),
        begin=entry.begin + low * row_bytes,
        end=entry.begin + high * row_bytes,
    )


def read_ahead(loads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results of the calls in order; while one is used, the next is made in a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="flyray-read") as pool:
        coming: Future[T] | None = None
        for load in loads:
            following = pool.submit(load)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()
