"""Routed experts from a checkpoint's format to the in-memory format that the kernels multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from ...kernels.cpu.converter import CpuConverter
from ...kernels.formats import GROUP_SIZE, PACK, dequantize_native, unpack_awq
from ...kernels.protocol import Bf16Matrix, ExpertMatrix, Fp8Matrix, Int4Matrix, Int4Weight, Int8Matrix, Int8Weight
from ..checkpoint import Checkpoint, CheckpointError
from .weight_memory import WeightMemory

# Rows of a matrix: its tensors in the order of the fields of its protocol class, without the expert dimension.
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


def allocate_matrix(format: str, experts: int, rows: int, columns: int, memory: WeightMemory) -> ExpertMatrix:
    """An uninitialized stack [experts, rows, columns] in a memory format."""

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return memory.empty(dtype, experts, rows, *shape)

    kind = MATRIX_KINDS[format]
    if kind is Int4Matrix:
        nibbles, multipliers = empty(torch.uint8, columns // 2), empty(torch.uint8, columns // GROUP_SIZE)
        return Int4Matrix(nibbles, multipliers, empty(torch.float32))
    if kind is Int8Matrix:
        return Int8Matrix(empty(torch.int8, columns), empty(torch.float32))
    if kind is Fp8Matrix:
        return Fp8Matrix(empty(torch.float8_e4m3fn, columns), empty(torch.float32))
    return Bf16Matrix(empty(torch.bfloat16, columns))


def matrix_rows(target: ExpertMatrix, expert: int, first: int, count: int) -> Parts:
    """Rows first.. of local expert number `expert`."""
    return tuple(getattr(target, field.name)[expert, first : first + count] for field in fields(target))


def memory_formats(disk: str) -> tuple[str, ...]:
    """The formats that a checkpoint in format `disk` can be run in, its own first."""
    return _MEMORY[disk]


def read_int8(checkpoint: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    """A module in INT8 per row, an expert's or another linear's: values [N, K] int8, scale [N] float32, borrowed."""
    zero_point = f"{name}.weight_zero_point"
    if checkpoint.has(zero_point) and bool(checkpoint.read(zero_point).any()):
        file = checkpoint.entry(zero_point).file
        raise CheckpointError(f"{file}: tensor {zero_point} has other values than the 0 of symmetric INT8")
    return checkpoint.borrow(f"{name}.weight"), checkpoint.borrow(f"{name}.weight_scale")


def on_cpu(target: Parts, fill: Callable[[Parts], None]) -> None:
    """Fills tensors of any device by what fills those of the CPU."""
    if target[0].device.type == "cpu":
        fill(target)
        return
    parts = tuple(torch.empty_like(part, device="cpu") for part in target)
    fill(parts)
    for part, filled in zip(target, parts, strict=True):
        part.copy_(filled)


def integer_weight(parts: Parts) -> Int4Weight | Int8Weight:
    """What the parts of an integer matrix's rows are as a linear's weight."""
    return Int8Weight(*parts) if len(parts) == 2 else Int4Weight(*parts)


class MatrixReader:
    """Reads expert matrices of one checkpoint to any device."""

    def __init__(self, checkpoint: Checkpoint, converter: CpuConverter) -> None:
        self._checkpoint, self._converter = checkpoint, converter

    def read(self, name: str, disk: str, memory: str, target: Parts) -> None:
        """Matrix `name` ("…experts.3.up_proj"), converted into target. Raises CheckpointError naming the matrix."""
        if memory not in memory_formats(disk):
            raise ValueError(f"{disk} cannot be read as {memory}")
        try:
            if disk == "w4a16" and memory in ("w4a8", "w8a8"):
                self._native(name, target)
            elif disk == "w4a8":
                self._folded(name, target)
            else:
                for part, stored in zip(target, self._as_stored(name, disk), strict=True):
                    part.copy_(stored)
        except ValueError as error:
            raise CheckpointError(f"{self._checkpoint.path}: {name}: {error}") from error

    def _native(self, name: str, target: Parts) -> None:
        self._check_shape(name)
        packed, scale = (self._checkpoint.borrow(f"{name}.{part}") for part in ("weight_packed", "weight_scale"))
        on_cpu(target, lambda parts: self._converter.native(packed, scale, integer_weight(parts)))

    def _folded(self, name: str, target: Parts) -> None:
        self._check_shape(name)
        packed, multipliers, scale = (
            self._checkpoint.borrow(f"{name}.{part}") for part in ("weight_packed", "weight_multiplier", "weight_scale")
        )
        on_cpu(target, lambda parts: self._converter.folded(packed, multipliers, Int4Weight(*parts)))
        target[2].copy_(scale)

    def _as_stored(self, name: str, disk: str) -> Parts:
        read = self._checkpoint.borrow
        match disk:
            case "w4a16":
                self._check_shape(name)
                return (dequantize_native(read(f"{name}.weight_packed"), read(f"{name}.weight_scale")),)
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
