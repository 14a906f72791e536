"""Reads single tensors, or rows of them, out of a safetensors checkpoint without touching the rest of its files.

Only headers are read when a `Checkpoint` opens; a tensor's own byte range is read when it is asked for, so that each of
many shards reads its part of a 555 GB checkpoint and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .read_ahead import ReadAhead
from .safetensors_header import CheckpointError, TensorEntry, dtype_name, read_header
from .storage import StorageError, read_range, reason, stored_path
from .weight_formats import WeightFormats, weight_formats

if TYPE_CHECKING:
    from upath import UPath

    from .storage import StoredPath

PREFIX = "language_model."
INDEX = "model.safetensors.index.json"

__all__ = ["Checkpoint", "CheckpointError", "TensorEntry", "read_config", "read_header", "read_tensor"]


def read_config(path: str | os.PathLike[str] | UPath) -> dict[str, Any]:
    """config.json of a folder, whatever else is in it. Raises CheckpointError."""
    try:
        return _read_json(stored_path(path) / "config.json")
    except StorageError as error:
        raise CheckpointError(f"{path}: {error}") from error


class Checkpoint:
    """The tensors of one checkpoint folder, here or behind an fsspec URL ("s3://bucket/folder").

    Names are given without the multimodal prefix "language_model.", which `prefix` holds if the checkpoint has it;
    tensors of other parts of the model (a vision tower) keep their full names. `bytes_read` counts tensor data read.
    """

    def __init__(self, path: str | os.PathLike[str] | UPath) -> None:
        try:
            self.path = stored_path(path)
        except StorageError as error:
            raise CheckpointError(f"{path}: {error}") from error
        # Not every remote file system has folders: there config.json says whether the checkpoint is there.
        if isinstance(self.path, Path) and not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such checkpoint folder")
        self.config: dict[str, Any] = _read_json(self.path / "config.json")
        self.files = _find_files(self.path)
        self.bytes_read = 0
        self._ahead: ReadAhead | None = None
        stored: dict[str, TensorEntry] = {}
        for file in self.files:
            for name, entry in read_header(file).items():
                if name in stored:
                    raise CheckpointError(f"{file}: tensor {name} is also in {stored[name].file.name}")
                stored[name] = entry
        _check_index(self.path, stored)
        self.prefix = PREFIX if any(name.startswith(PREFIX) for name in stored) else ""
        self._entries = {name.removeprefix(self.prefix): entry for name, entry in stored.items()}
        self._stored_names = {name.removeprefix(self.prefix): name for name in stored}
        if len(self._entries) != len(stored):
            twice = next(name for name in stored if self.prefix and self.prefix + name in stored)
            raise CheckpointError(f"{self.path}: tensor {twice} is there with and without the prefix {self.prefix!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, without the prefix, file by file in the order of the headers."""
        return tuple(self._entries)

    def has(self, name: str) -> bool:
        return name in self._entries

    def stored_name(self, name: str) -> str:
        """The name in the file, with the prefix."""
        self.entry(name)
        return self._stored_names[name]

    def entry(self, name: str) -> TensorEntry:
        """Raises CheckpointError if the tensor is missing."""
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {self.prefix}{name} is missing") from None

    def read(
        self, name: str, dtype: torch.dtype | tuple[torch.dtype, ...] = (), shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """The whole tensor. With `dtype` (one or several) or `shape`, anything else is a CheckpointError."""
        entry = self.expect(name, dtype, shape)
        if self._ahead is not None and name in self._ahead:
            first, *others = self.pieces(name)
            return torch.cat([first, *others]) if others else first.clone()
        self.bytes_read += entry.bytes
        return read_tensor(name, entry)

    @contextmanager
    def reading_ahead(self, names: Iterable[str]) -> Iterator[None]:
        """Meanwhile these tensors, to be read once each and best in this order, are read by another thread before they
        are asked for."""
        self._ahead = ReadAhead((name, self.entry(name)) for name in names)
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    @contextmanager
    def only_rows(self, rows: Mapping[str, range]) -> Iterator[None]:
        """Meanwhile each of these tensors, where it is there, has these rows alone."""
        whole = self._entries
        parts = {name: whole[name].rows(part.start, part.stop) for name, part in rows.items() if name in whole}
        self._entries = whole | parts
        try:
            yield
        finally:
            self._entries = whole

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor in parts of whole rows, to be looked at and let go: the memory of one that was read ahead is used
        again when nobody holds it."""
        if self._ahead is None or name not in self._ahead:
            yield self.read(name)
            return
        for piece in self._ahead.take(name):
            self.bytes_read += piece.nbytes
            yield piece

    def borrow(self, name: str) -> Tensor:
        """The whole tensor, to be looked at and let go as a piece of `pieces`."""
        first, *others = self.pieces(name)
        return torch.cat([first, *others]) if others else first

    def read_rows(self, name: str, low: int, high: int) -> Tensor:
        """Rows low..high of the first dimension, reading those bytes only: [high - low, ...]."""
        entry = self.entry(name)
        if not entry.shape or not 0 <= low <= high <= entry.shape[0]:
            raise CheckpointError(
                f"{entry.file}: rows {low}..{high} of tensor {name} asked for, its shape is {list(entry.shape)}"
            )
        part = entry.rows(low, high)
        self.bytes_read += part.bytes
        return read_tensor(name, part)

    def expect(
        self, name: str, dtype: torch.dtype | tuple[torch.dtype, ...] = (), shape: tuple[int, ...] | None = None
    ) -> TensorEntry:
        """The entry, checked against what the caller can use, from the header alone."""
        entry = self.entry(name)
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        if allowed and entry.dtype not in allowed:
            wanted = " or ".join(dtype_name(d) for d in allowed)
            raise CheckpointError(f"{entry.file}: tensor {name} has dtype {dtype_name(entry.dtype)}, expected {wanted}")
        if shape is not None and entry.shape != tuple(shape):
            raise CheckpointError(f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)}")
        return entry

    @cached_property
    def formats(self) -> WeightFormats:
        """Every weight's format, from config.json and the tensors together. Raises CheckpointError if they contradict
        each other, or are none that flyray knows."""
        try:
            return weight_formats(self.config, self.prefix, self._entries)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def expert_format(self) -> str:
        """The routed experts' format, one of `kernels.formats.FORMATS`, or "mixed"."""
        return self.formats.experts

    def matrix_format(self, layer: int, expert: int) -> str:
        """One routed expert's format; its three matrices share one."""
        try:
            return self.formats.matrix(layer, expert)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None


def read_tensor(name: str, entry: TensorEntry) -> Tensor:
    """The tensor at `entry`, without a `Checkpoint`; `name` is for the CheckpointError of a file that has changed."""
    data = torch.empty((entry.end - entry.begin) // entry.dtype.itemsize, dtype=entry.dtype)
    if entry.end > entry.begin:
        target = data.view(torch.uint8).numpy().data
        try:
            done = read_range(entry.file, entry.begin, target)
        except StorageError as error:
            raise CheckpointError(f"{entry.file}: cannot be read for tensor {name}: {error}") from error
        if done < len(target):
            raise CheckpointError(f"{entry.file}: truncated while reading tensor {name} at byte {entry.begin + done}")
    return data.reshape(entry.shape)


def _find_files(path: StoredPath) -> tuple[StoredPath, ...]:
    index = path / INDEX
    if not index.exists():
        files = tuple(sorted(path.glob("*.safetensors"), key=lambda file: file.name))
        if not files:
            raise CheckpointError(f"{path}: neither {INDEX} nor any *.safetensors file")
        return files
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names {name!r}, which is not a file of this folder")
        if not (path / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is not there")
    if not names:
        raise CheckpointError(f"{index}: names no tensor")
    return tuple(path / name for name in names)


def _check_index(path: StoredPath, stored: dict[str, TensorEntry]) -> None:
    index = path / INDEX
    if not index.exists():
        return
    for name, file in _weight_map(index).items():
        if name not in stored:
            raise CheckpointError(f"{path / file}: tensor {name} is missing, {INDEX} says that it is there")
        if stored[name].file.name != file:
            raise CheckpointError(f"{index}: puts tensor {name} in {file}, it is in {stored[name].file.name}")


def _weight_map(index: StoredPath) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor names to file names")
    return weight_map


def _read_json(file: StoredPath) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except Exception as error:  # each file system has its own
        raise CheckpointError(f"{file}: cannot be read: {reason(error)}") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is not a JSON object")
    return content
