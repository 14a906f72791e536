"""Routed experts from a checkpoint's format to the in-memory format that the kernels multiply."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property

import torch
from torch import Tensor

from ...kernels.formats import (
    GROUP_SIZE,
    PACK,
    dequantize_native,
    split_packed,
    unpack_awq,
    unpack_multipliers,
)
from ...kernels.protocol import Bf16Matrix, ExpertMatrix, Fp8Matrix, Int4Matrix, Int8Matrix
from ...kernels.quantizer import WeightQuantizer
from ...kernels.select import select_quantizer
from ..checkpoint import Checkpoint, CheckpointError

# A matrix's tensors in the order of the fields of its protocol class, without the expert dimension.
Parts = tuple[Tensor, ...]

_MEMORY: dict[str, tuple[str, ...]] = {
    "w4a16": ("w4a16", "bf16", "w4a8", "w8a8"),
    "bf16": ("bf16",),
    "w4a8": ("w4a8",),
    "w8a8": ("w8a8",),
    "w8a8-fp8": ("w8a8-fp8",),
    "w4a8-channel": ("w4a8-channel",),
}

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


def memory_formats(disk: str) -> tuple[str, ...]:
    """The formats that a checkpoint in format `disk` can be run in, its own first."""
    return _MEMORY[disk]


def read_int8(checkpoint: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    """A module in INT8 per row, an expert's or another linear's: values [N, K] int8, scale [N] float32."""
    zero_point = f"{name}.weight_zero_point"
    if checkpoint.has(zero_point) and bool(checkpoint.read(zero_point).any()):
        file = checkpoint.entry(zero_point).file
        raise CheckpointError(f"{file}: tensor {zero_point} has other values than the 0 of symmetric INT8")
    return checkpoint.read(f"{name}.weight"), checkpoint.read(f"{name}.weight_scale")


class MatrixReader:
    """Reads expert matrices of one checkpoint to a device, where they are converted. threads: what quantizing native
    matrices on the CPU may use."""

    def __init__(self, checkpoint: Checkpoint, threads: int, device: torch.device) -> None:
        self._checkpoint, self._threads, self._device = checkpoint, threads, device

    def read(self, name: str, disk: str, memory: str) -> Parts:
        """Matrix `name` ("…experts.3.up_proj"), converted. Raises CheckpointError naming the matrix."""
        if memory not in memory_formats(disk):
            raise ValueError(f"{disk} cannot be read as {memory}")
        try:
            return self._native(name, memory) if disk == "w4a16" else self._as_stored(name, disk)
        except ValueError as error:
            raise CheckpointError(f"{self._checkpoint.path}: {name}: {error}") from error

    @cached_property
    def _quantizer(self) -> WeightQuantizer:
        # Every backend's gives the same bits; these do it at the speed of memory.
        return select_quantizer("cpu" if self._device.type == "cpu" else "torch", self._threads)

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(name).to(self._device)

    def _native(self, name: str, memory: str) -> Parts:
        self._check_shape(name)
        packed, scale = self._read(f"{name}.weight_packed"), self._read(f"{name}.weight_scale")
        if memory == "w4a8":
            folded = self._quantizer.fold(packed, scale)
            return split_packed(packed), folded.multipliers, folded.scale
        if memory == "w8a8":
            weight = dequantize_native(packed, scale, dtype=torch.float32)
            rows = self._quantizer.row_scales(weight, 8, None, clip=False)
            return self._quantizer.round_rows(weight, rows, 8), rows
        return (dequantize_native(packed, scale),)

    def _as_stored(self, name: str, disk: str) -> Parts:
        read = self._read
        match disk:
            case "w4a8":
                self._check_shape(name)
                nibbles = split_packed(read(f"{name}.weight_packed"))
                return nibbles, unpack_multipliers(read(f"{name}.weight_multiplier")), read(f"{name}.weight_scale")
            case "w8a8":
                return read_int8(self._checkpoint, name)
            case "w4a8-channel":
                scale = read(f"{name}.weight_scale") * read(f"{name}.weight_scale_2")
                return unpack_awq(read(f"{name}.weight")), scale
            case "w8a8-fp8":
                return read(f"{name}.weight"), read(f"{name}.weight_scale")
        return (read(f"{name}.weight"),)

    def _check_shape(self, name: str) -> None:
        """`weight_shape`, where an exporter wrote it, must say what the packed tensor's own shape says."""
        tensor, checkpoint = f"{name}.weight_shape", self._checkpoint
        if not checkpoint.has(tensor):
            return
        rows, words = checkpoint.entry(f"{name}.weight_packed").shape
        found, expected = checkpoint.read(tensor).tolist(), [rows, words * PACK]
        if found != expected:
            raise CheckpointError(f"{checkpoint.entry(tensor).file}: tensor {tensor} says {found}, expected {expected}")
