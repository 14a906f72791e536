"""Writes one safetensors file tensor by tensor: the header first, from shapes known in advance, then data in any
order, so that a file of any size is written within the memory of one tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ...actors.safetensors_header import DTYPES, TensorEntry
from .matrix import QuantizeError, TensorSpec

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY_BYTES = 16 << 20


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is whole. Hidden, and no *.safetensors, so that nobody reads it."""
    return path.with_name(f".{path.name}.part")


class SafetensorsWriter:
    """A context manager. `commit` gives the file its final name; leaving without it deletes what was written, so a
    full disk or an error never leaves a half-written file under the final name."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self.specs = dict(specs)
        self._begin: dict[str, int] = {}
        self._missing = set(self.specs)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, spec in self.specs.items():
            header[name] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.bytes],
            }
            self._begin[name] = offset
            offset += spec.bytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # the format asks for aligned data, padded with spaces
        self._start = 8 + len(raw)
        self._file = os.open(temporary_path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self._write(0, memoryview(len(raw).to_bytes(8, "little") + raw))
        except BaseException:
            self.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises QuantizeError if the tensor is not the one announced, OSError if the disk does not take it."""
        spec = self.specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise QuantizeError(
                f"{self.path.name}: tensor {name} came out as {tensor.dtype} {list(tensor.shape)}, "
                f"expected {spec.dtype} {list(spec.shape)}"
            )
        if spec.bytes:
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            self._write(self._start + self._begin[name], data)
        self._missing.discard(name)

    def copy(self, name: str, entry: TensorEntry) -> None:
        """Copies a tensor's bytes as they are."""
        position = self._start + self._begin[name]
        source = os.open(entry.file, os.O_RDONLY)
        try:
            for begin in range(entry.begin, entry.end, _COPY_BYTES):
                wanted = min(_COPY_BYTES, entry.end - begin)
                data = os.pread(source, wanted, begin)
                if len(data) != wanted:
                    raise QuantizeError(f"{entry.file}: truncated while copying tensor {name}")
                self._write(position + begin - entry.begin, memoryview(data))
        finally:
            os.close(source)
        self._missing.discard(name)

    def commit(self) -> None:
        """Gives the file its final name, once every announced tensor is in it and on disk."""
        if self._missing:
            raise QuantizeError(f"{self.path.name}: tensor {min(self._missing)} was not written")
        os.fsync(self._file)
        os.replace(temporary_path(self.path), self.path)

    def close(self) -> None:
        """Closes the file, and deletes it unless it was committed."""
        os.close(self._file)
        temporary_path(self.path).unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, position: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], position + done)
