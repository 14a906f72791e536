"""One expert matrix on disk: which tensors a format writes for it, and the weights that they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import formats
from ...kernels.formats import GROUP_SIZE, PACK

TARGET_FORMATS = ("w4a8", "w8a8", "w8a8-fp8", "w4a8-channel")
SOURCE_FORMATS = ("w4a16", "bf16")


class QuantizeError(Exception):
    """A checkpoint that cannot be quantized as asked; the message says what would be right."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def output_specs(format: str, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors of one [rows, columns] matrix by the last part of their names."""
    row_scale = TensorSpec(torch.float32, (rows,))
    match format:
        case "w4a8":
            return {
                "weight_packed": TensorSpec(torch.int32, (rows, columns // PACK)),
                "weight_multiplier": TensorSpec(torch.uint8, (rows, columns // (2 * GROUP_SIZE))),
                "weight_scale": row_scale,
                "weight_shape": TensorSpec(torch.int32, (2,)),
            }
        case "w8a8":
            return {"weight": TensorSpec(torch.int8, (rows, columns)), "weight_scale": row_scale}
        case "w8a8-fp8":
            return {"weight": TensorSpec(torch.float8_e4m3fn, (rows, columns)), "weight_scale": row_scale}
        case "w4a8-channel":
            return {
                "weight": TensorSpec(torch.int32, (rows, columns // PACK)),
                "weight_scale": TensorSpec(torch.float32, ()),
                "weight_scale_2": row_scale,
            }
    raise QuantizeError(f"unknown format {format!r}; known are {', '.join(TARGET_FORMATS)}")


def check_columns(matrix: str, columns: int, source_format: str, format: str) -> None:
    """Raises QuantizeError, naming the matrix, if its columns do not fit a group or a pack. Nothing is ever padded."""
    rules = [(GROUP_SIZE, "the source's groups")] if source_format == "w4a16" else []
    if format == "w4a8":
        rules.append((2 * GROUP_SIZE, f"w4a8 (groups of {GROUP_SIZE}, two multipliers a byte)"))
    if format == "w4a8-channel":
        rules.append((PACK, f"w4a8-channel ({PACK} values an int32)"))
    for multiple, what in rules:
        if columns % multiple:
            raise QuantizeError(f"{matrix} has {columns} columns, not a multiple of {multiple} as needed for {what}")


def dequantize(format: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The weights [N, K] float32 that a matrix's tensors stand for, in any of `formats.FORMATS`."""
    match format:
        case "bf16":
            return parts["weight"].float()
        case "w4a16":
            return formats.dequantize_native(parts["weight_packed"], parts["weight_scale"], torch.float32)
        case "w4a8":
            values = formats.unpack_native(parts["weight_packed"])
            multipliers = formats.unpack_multipliers(parts["weight_multiplier"])
            return formats.dequantize_folded(values, formats.FoldedScales(multipliers, parts["weight_scale"]))
        case "w4a8-channel":
            scale = parts["weight_scale_2"] * parts["weight_scale"]
            return formats.dequantize_rows(formats.unpack_awq(parts["weight"]), scale)
        case "w8a8" | "w8a8-fp8":
            return formats.dequantize_rows(parts["weight"], parts["weight_scale"])
    raise QuantizeError(f"unknown format {format!r}; known are {', '.join(formats.FORMATS)}")
