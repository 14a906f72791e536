"""Routed experts from a checkpoint's format to the in-memory format that the kernels multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from ...kernels.formats import (
    GROUP_SIZE,
    PACK,
    dequantize_native,
    fold_scales,
    quantize_int8_rows,
    split_nibbles,
    unpack_awq,
    unpack_multipliers,
    unpack_native,
)
from ...kernels.protocol import Bf16Matrix, ExpertMatrix, Fp8Matrix, Int4Matrix, Int8Matrix
from ..checkpoint import Checkpoint, CheckpointError

# A matrix's tensors in the order of the fields of its protocol class, without the expert dimension.
Parts = tuple[Tensor, ...]
_Reader = Callable[[Checkpoint, str], Parts]


MATRIX_KINDS: dict[str, type[ExpertMatrix]] = {
    "bf16": Bf16Matrix,
    "w4a16": Bf16Matrix,
    "w4a8": Int4Matrix,
    "w8a8": Int8Matrix,
    "w4a8-channel": Int8Matrix,
    "w8a8-fp8": Fp8Matrix,
}
"""What each memory format is multiplied as."""


def allocate_matrix(memory: str, experts: int, rows: int, columns: int, device: torch.device) -> ExpertMatrix:
    """An uninitialized stack [experts, rows, columns] in a memory format."""

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((experts, rows, *shape), dtype=dtype, device=device)

    kind = MATRIX_KINDS[memory]
    if kind is Int4Matrix:
        nibbles, multipliers = empty(torch.uint8, columns // 2), empty(torch.uint8, columns // GROUP_SIZE)
        return Int4Matrix(nibbles, multipliers, empty(torch.float32))
    if kind is Int8Matrix:
        return Int8Matrix(empty(torch.int8, columns), empty(torch.float32))
    if kind is Fp8Matrix:
        return Fp8Matrix(empty(torch.float8_e4m3fn, columns), empty(torch.float32))
    return Bf16Matrix(empty(torch.bfloat16, columns))


def fill_matrix(target: ExpertMatrix, expert: int, first_row: int, parts: Parts) -> None:
    """Copies one matrix's parts to rows first_row.. of local expert number `expert`."""
    for field, part in zip(fields(target), parts, strict=True):
        getattr(target, field.name)[expert, first_row : first_row + part.shape[0]].copy_(part)


def read_matrix(checkpoint: Checkpoint, name: str, disk: str, memory: str) -> Parts:
    """Reads matrix `name` ("…experts.3.up_proj") and converts it. Raises CheckpointError naming the matrix."""
    try:
        return _READERS[disk, memory](checkpoint, name)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {name}: {error}") from error


def memory_formats(disk: str) -> tuple[str, ...]:
    """The formats that a checkpoint in format `disk` can be run in, its own first."""
    return tuple(memory for source, memory in _READERS if source == disk)


def _read_native(checkpoint: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    _check_shape(checkpoint, name)
    return checkpoint.read(f"{name}.weight_packed"), checkpoint.read(f"{name}.weight_scale")


def _native_as_bf16(checkpoint: Checkpoint, name: str) -> Parts:
    return (dequantize_native(*_read_native(checkpoint, name)),)


def _native_as_w4a8(checkpoint: Checkpoint, name: str) -> Parts:
    packed, group_scale = _read_native(checkpoint, name)
    values = unpack_native(packed)
    folded = fold_scales(values, group_scale)
    return split_nibbles(values), folded.multipliers, folded.scale


def _native_as_w8a8(checkpoint: Checkpoint, name: str) -> Parts:
    return quantize_int8_rows(dequantize_native(*_read_native(checkpoint, name), dtype=torch.float32))


def _bf16(checkpoint: Checkpoint, name: str) -> Parts:
    return (checkpoint.read(f"{name}.weight"),)


def _w4a8(checkpoint: Checkpoint, name: str) -> Parts:
    _check_shape(checkpoint, name)
    nibbles = split_nibbles(unpack_native(checkpoint.read(f"{name}.weight_packed")))
    multipliers = unpack_multipliers(checkpoint.read(f"{name}.weight_multiplier"))
    return nibbles, multipliers, checkpoint.read(f"{name}.weight_scale")


def read_int8(checkpoint: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    """A module in INT8 per row, an expert's or another linear's: values [N, K] int8, scale [N] float32."""
    zero_point = f"{name}.weight_zero_point"
    if checkpoint.has(zero_point) and bool(checkpoint.read(zero_point).any()):
        file = checkpoint.entry(zero_point).file
        raise CheckpointError(f"{file}: tensor {zero_point} has other values than the 0 of symmetric INT8")
    return checkpoint.read(f"{name}.weight"), checkpoint.read(f"{name}.weight_scale")


def _w8a8_fp8(checkpoint: Checkpoint, name: str) -> Parts:
    return checkpoint.read(f"{name}.weight"), checkpoint.read(f"{name}.weight_scale")


def _w4a8_channel(checkpoint: Checkpoint, name: str) -> Parts:
    scale = checkpoint.read(f"{name}.weight_scale") * checkpoint.read(f"{name}.weight_scale_2")
    return unpack_awq(checkpoint.read(f"{name}.weight")), scale


def _check_shape(checkpoint: Checkpoint, name: str) -> None:
    """`weight_shape`, where an exporter wrote it, must say what the packed tensor's own shape says."""
    tensor = f"{name}.weight_shape"
    if not checkpoint.has(tensor):
        return
    rows, words = checkpoint.entry(f"{name}.weight_packed").shape
    found, expected = checkpoint.read(tensor).tolist(), [rows, words * PACK]
    if found != expected:
        raise CheckpointError(f"{checkpoint.entry(tensor).file}: tensor {tensor} says {found}, expected {expected}")


_READERS: dict[tuple[str, str], _Reader] = {
    ("w4a16", "w4a16"): _native_as_bf16,
    ("w4a16", "bf16"): _native_as_bf16,
    ("w4a16", "w4a8"): _native_as_w4a8,
    ("w4a16", "w8a8"): _native_as_w8a8,
    ("bf16", "bf16"): _bf16,
    ("w4a8", "w4a8"): _w4a8,
    ("w8a8", "w8a8"): read_int8,
    ("w8a8-fp8", "w8a8-fp8"): _w8a8_fp8,
    ("w4a8-channel", "w4a8-channel"): _w4a8_channel,
}
