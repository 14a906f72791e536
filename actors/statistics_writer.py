"""Fills a statistics folder: the engine opens and completes it, every shard adds to files of its own in place.

The files are mapped into memory and as large as they will be from the start, so that a model's statistics need no
memory beyond the pages in use, and a full disk is an error when the engine starts and not in the middle of a run.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .safetensors_header import DTYPES
from .statistics import RECORD, read_record
from .statistics_plan import StatisticsError, StatisticsPlan

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StatisticsFolder:
    """The folder while an engine gathers; incomplete until `complete`, whatever happens."""

    def __init__(self, path: str | Path, plan: StatisticsPlan) -> None:
        """Makes the folder or takes over an incomplete one that no running engine has. Raises StatisticsError."""
        self.path, self._plan = Path(path), plan
        self._file = self.path / RECORD
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._refusal(error) from error
        try:
            self._begin()
        except OSError as error:
            self.close()
            raise self._refusal(error) from error
        except BaseException:
            self.close()
            raise

    def complete(self, tokens: int) -> None:
        """Says that all files are whole, with the tokens that were run. Raises StatisticsError."""
        self._write(tokens, True)
        self.close()

    def close(self) -> None:
        """Lets others have the folder; without `complete` it stays incomplete. May be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _begin(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StatisticsError(f"{self.path}: another engine gathers there; name another folder") from None
        if self._file.exists() and read_record(self.path)["complete"]:
            raise StatisticsError(f"{self._file}: complete statistics are there; name another folder, or remove it")
        others = [item.name for item in self.path.iterdir() if not _is_own(item.name)]
        if others:
            raise StatisticsError(
                f"{self.path}: holds {min(others)}, which is no statistics file; name a folder for them alone"
            )
        self._write(0, False)
        for item in self.path.glob("layer-*.safetensors"):  # of a run that was killed
            item.unlink()

    def _refusal(self, error: OSError) -> StatisticsError:
        return StatisticsError(f"{self.path}: cannot take statistics: {error.strerror}")

    def _write(self, tokens: int, complete: bool) -> None:
        """Replaces statistics.json as a whole, and only after all else is on the disk."""
        content = json.dumps(self._plan.record(tokens, complete), indent=1) + "\n"
        part = self.path / (RECORD + ".part")
        try:
            with part.open("w", encoding="utf-8") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(self._file)
        except OSError as error:
            raise StatisticsError(f"{part}: cannot be written: {error.strerror}") from error


def _is_own(name: str) -> bool:
    is_layer = name.startswith("layer-") and name.endswith(".safetensors")
    return is_layer or name in (".lock", RECORD, RECORD + ".part")


@dataclass(frozen=True)
class LayerSums:
    """One layer's tensors of one shard, as in `StatisticsPlan.tensors`; what is written to them is in the file."""

    count: Tensor
    input_absmax: Tensor
    input_energy: Tensor
    inner_absmax: Tensor
    inner_energy: Tensor
    input_moments: Tensor | None = None
    inner_moments: Tensor | None = None


class ShardStatistics:
    """One shard's files, all zeros at first. Raises StatisticsError where a file cannot be made or flushed."""

    def __init__(self, path: str | Path, plan: StatisticsPlan, shard: int) -> None:
        self._files = {layer: Path(path) / plan.file(layer, shard) for layer in plan.layers}
        self._maps: dict[int, mmap.mmap] = {}
        self._sums: dict[int, LayerSums] = {}
        header, places = _layout(plan.tensors(shard))
        for layer, file in self._files.items():
            area = self._maps[layer] = _create(file, header, max(end for _, _, _, end in places.values()))
            tensors = {
                name: torch.frombuffer(area, dtype=dtype, count=shape.numel(), offset=begin).view(shape)
                for name, (dtype, shape, begin, _) in places.items()
            }
            self._sums[layer] = LayerSums(**tensors)

    def layer(self, number: int) -> LayerSums:
        """The sums of a layer, to be added to."""
        return self._sums[number]

    def flush(self) -> None:
        """Returns when everything is on the disk."""
        for layer, area in self._maps.items():
            self._try(layer, area.flush)

    def _try(self, layer: int, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            raise StatisticsError(f"{self._files[layer]}: cannot be written: {error.strerror}") from error


_Places = dict[str, tuple[torch.dtype, torch.Size, int, int]]


def _layout(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, _Places]:
    """The header with its length before it, and every tensor's dtype, shape, first and last byte in the file."""
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    places = {}
    for name, (dtype, shape) in tensors.items():
        first, last = entries[name]["data_offsets"]
        places[name] = (dtype, torch.Size(shape), len(header) + first, len(header) + last)
    return header, places


def _create(file: Path, header: bytes, size: int) -> mmap.mmap:
    """A file of zeros after the header, its room on the disk taken, mapped for writing."""
    try:
        with file.open("w+b") as stream:
            stream.write(header)
            stream.flush()
            os.posix_fallocate(stream.fileno(), 0, size)
            return mmap.mmap(stream.fileno(), size)
    except OSError as error:
        raise StatisticsError(f"{file}: {size} bytes cannot be reserved: {error.strerror}") from error
