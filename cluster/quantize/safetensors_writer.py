"""Writes one safetensors file from front to back: the header first, from shapes known in advance, then the tensors in
its order, whole or in pieces. The SHA-256 runs along, in a thread of its own as the writing does."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ...actors.safetensors_header import DTYPES
from .matrix import QuantizeError, TensorSpec
from .target_folder import part_path, sync_folder

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# So often is data sent to the disk, so that the flush at the end has little left to do.
_FLUSH_BYTES = 64 << 20
WRITE_BEHIND = 32 << 20
"""Bytes that wait to be written."""


class SafetensorsWriter:
    """A context manager. `commit` gives the file its final name; leaving without it deletes what was written, so a
    full disk or an error never leaves a half-written file under the final name.

    Data given to it must not be changed before the writer is closed.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self.specs = dict(specs)
        self._order = iter(self.specs.items())
        self._current: tuple[str, TensorSpec] | None = None
        self._left = 0
        self._part = part_path(path)
        self._sink = _Sink(self._part)
        self._sink.put(memoryview(_header(self.specs)))
        self._next()

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor, or its next rows. Raises QuantizeError if it is not the one announced, OSError if the disk
        does not take it (or did not take what was given before)."""
        spec = self.specs[name]
        rows_fit = tuple(tensor.shape[1:]) == spec.shape[1:] and tensor.dim() == len(spec.shape)
        if tensor.dtype != spec.dtype or not (rows_fit or (tensor.numel() == 1 and spec.shape in ((), (1,)))):
            raise QuantizeError(
                f"{self.path.name}: tensor {name} came out as {tensor.dtype} {list(tensor.shape)}, "
                f"expected {spec.dtype} {list(spec.shape)}"
            )
        self.write_bytes(name, tensor_bytes(tensor))

    def write_bytes(self, name: str, data: memoryview) -> None:
        """The next bytes of the tensor `name`."""
        if self._current is None or self._current[0] != name:
            expected = "the end" if self._current is None else self._current[0]
            raise QuantizeError(f"{self.path.name}: tensor {name} was given where {expected} comes")
        if len(data) > self._left:
            raise QuantizeError(f"{self.path.name}: tensor {name} has {len(data) - self._left} bytes too many")
        self._left -= len(data)
        self._sink.put(data)
        if not self._left:
            self._next()

    def commit(self) -> tuple[int, str]:
        """Gives the file its final name, once every announced tensor is in it and on disk. Returns its bytes and its
        SHA-256."""
        if self._current is not None:
            raise QuantizeError(f"{self.path.name}: tensor {self._current[0]} was not written")
        size, digest = self._sink.finish()
        os.replace(self._part, self.path)
        sync_folder(self.path.parent)
        return size, digest

    def close(self) -> None:
        """Closes the file, and deletes it unless it was committed."""
        self._sink.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> None:
        """The next tensor that has any bytes."""
        for name, spec in self._order:
            if spec.bytes:
                self._current, self._left = (name, spec), spec.bytes
                return
        self._current = None


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in memory order, without a copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the format asks for aligned data, padded with spaces
    return len(raw).to_bytes(8, "little") + raw


class _Sink:
    """A file written and hashed by a thread, with at most WRITE_BEHIND bytes (or one piece) waiting."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._hash = hashlib.sha256()
        self._size = 0
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._ended = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="flyray-write", daemon=True)
        self._thread.start()

    def put(self, data: memoryview) -> None:
        with self._change:
            while self._waiting_bytes and self._waiting_bytes + len(data) > WRITE_BEHIND and self._error is None:
                self._change.wait()
            if self._error is not None:
                raise self._error
            self._waiting.append(data)
            self._waiting_bytes += len(data)
            self._change.notify_all()

    def finish(self) -> tuple[int, str]:
        """Waits until all is on disk. Returns bytes and SHA-256."""
        self._end()
        if self._error is not None:
            raise self._error
        os.fsync(self._file)
        return self._size, self._hash.hexdigest()

    def close(self) -> None:
        with self._change:
            self._waiting.clear()
        self._end()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _end(self) -> None:
        with self._change:
            self._ended = True
            self._change.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (data := self._take()) is not None:
                self._write(data)
                with self._change:
                    self._waiting_bytes -= len(data)
                    self._change.notify_all()
        except BaseException as error:
            with self._change:
                self._error = error
                self._change.notify_all()

    def _take(self) -> memoryview | None:
        with self._change:
            while not self._waiting and not self._ended:
                self._change.wait()
            return self._waiting.popleft() if self._waiting else None

    def _write(self, data: memoryview) -> None:
        self._hash.update(data)
        done = 0
        while done < len(data):
            done += os.write(self._file, data[done:])
        before, self._size = self._size, self._size + len(data)
        if before // _FLUSH_BYTES != self._size // _FLUSH_BYTES:
            # Linux begins to write what is dirty, and does not wait for it.
            os.posix_fadvise(self._file, 0, self._size, os.POSIX_FADV_DONTNEED)
