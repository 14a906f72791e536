"""The header of a safetensors file: an 8-byte little-endian length, then JSON `{name: {dtype, shape, data_offsets}}`;
the offsets count from the header's end. Parsed by hand so that no data is mapped and every damage has a message."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .storage import reason

if TYPE_CHECKING:
    from .storage import StoredPath

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MAX_HEADER = 100_000_000  # the safetensors library's own limit


class CheckpointError(Exception):
    """A checkpoint that cannot be read as it stands; the message names the file and, where there is one, the tensor."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: bytes begin..end of `file`."""

    file: StoredPath
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    def rows(self, low: int, high: int) -> TensorEntry:
        """Where rows low..high of the first dimension lie: [high - low, ...]."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (high - low, *self.shape[1:])
        return replace(self, shape=shape, begin=self.begin + low * row, end=self.begin + high * row)


def read_header(file: StoredPath) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, by its stored name; CheckpointError if the header or data is damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            if len(head) < 8:
                raise CheckpointError(f"{file}: truncated: {size} bytes, not even a safetensors header length")
            (length,) = struct.unpack("<Q", head)
            if length > _MAX_HEADER:
                raise CheckpointError(f"{file}: header length {length} is over {_MAX_HEADER}: not a safetensors file")
            if 8 + length > size:
                raise CheckpointError(f"{file}: truncated: header of {length} bytes in a file of {size}")
            raw = stream.read(length)
    except CheckpointError:
        raise
    except Exception as error:  # each file system has its own
        raise CheckpointError(f"{file}: cannot be read: {reason(error)}") from error
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{file}: header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _parse_entry(file, name, item, 8 + length, size) for name, item in header.items()}


def _parse_entry(file: StoredPath, name: str, item: Any, start: int, size: int) -> TensorEntry:
    try:
        dtype_name, shape, (first, last) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        numbers = (*shape, first, last)
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file}: tensor {name}: header entry lacks dtype, shape or data_offsets") from None
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers) or first > last:
        raise CheckpointError(f"{file}: tensor {name}: shape {list(shape)} or offsets [{first}, {last}] are not valid")
    if dtype_name not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name} has dtype {dtype_name}; known are {', '.join(DTYPES)}")
    dtype = DTYPES[dtype_name]
    if math.prod(shape) * dtype.itemsize != last - first:
        raise CheckpointError(
            f"{file}: tensor {name}: {last - first} bytes do not hold shape {list(shape)} of {dtype_name}"
        )
    if start + last > size:
        raise CheckpointError(f"{file}: truncated: tensor {name} ends at byte {start + last}, the file has {size}")
    return TensorEntry(file, dtype, shape, start + first, start + last)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as messages show it: "int32" for torch.int32."""
    return str(dtype).removeprefix("torch.")
