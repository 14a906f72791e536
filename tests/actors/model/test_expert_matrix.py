"""Native matrices, converted while they are loaded, against the same conversions step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepseek_oracle import NATIVE, QUANTIZATION, WRITERS, save_checkpoint, write_native

from flyray.actors.checkpoint import Checkpoint, CheckpointError
from flyray.actors.model.expert_matrix import MatrixReader, Parts, allocate_matrix, matrix_rows, memory_formats
from flyray.actors.model.weight_memory import WeightMemory
from flyray.kernels.cpu.converter import CpuConverter
from flyray.kernels.formats import (
    FORMATS,
    dequantize_native,
    fold_scales,
    pack_native,
    quantize_int8_rows,
    quantize_native,
    split_nibbles,
)

NAME = "model.layers.1.mlp.experts.0.gate_proj"


def read(reader: MatrixReader, disk: str, memory: str, rows: int, columns: int) -> Parts:
    matrix = allocate_matrix(memory, 1, rows, columns, WeightMemory(torch.device("cpu")))
    parts = matrix_rows(matrix, 0, 0, rows)
    reader.read(NAME, disk, memory, parts)
    return parts


@pytest.mark.parametrize("threads", [1, 3])
def test_native_matrices_are_converted_as_step_by_step(threads: int, tmp_path: Path) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * torch.rand(40, 1)
    weight[7] = 0
    tensors = {f"{NAME}.{part}": tensor for part, tensor in write_native(weight).items()}
    reader = MatrixReader(Checkpoint(save_checkpoint(tmp_path, {}, tensors, NATIVE)), CpuConverter(threads))
    values, scale = quantize_native(weight)
    folded = fold_scales(values, scale)
    nibbles, multipliers, rows = read(reader, "w4a16", "w4a8", 40, 96)
    assert torch.equal(nibbles, split_nibbles(values))
    assert torch.equal(multipliers, folded.multipliers)
    assert torch.equal(rows, folded.scale)
    dense = dequantize_native(pack_native(values), scale, torch.float32)
    for found, expected in zip(read(reader, "w4a16", "w8a8", 40, 96), quantize_int8_rows(dense), strict=True):
        assert torch.equal(found, expected)
    for memory in ("w4a16", "bf16"):
        (found,) = read(reader, "w4a16", memory, 40, 96)
        assert torch.equal(found, dense.bfloat16())


def test_scales_that_are_not_finite_are_named_in_every_memory_format_that_quantizes(tmp_path: Path) -> None:
    parts = write_native(torch.randn(8, 64, generator=torch.Generator().manual_seed(2)))
    parts["weight_scale"][5, 1] = float("inf")
    tensors = {f"{NAME}.{part}": tensor for part, tensor in parts.items()}
    reader = MatrixReader(Checkpoint(save_checkpoint(tmp_path, {}, tensors, NATIVE)), CpuConverter(1))
    for memory, message in (("w4a8", "row 5, group 1 is inf"), ("w8a8", "row 5")):
        with pytest.raises(CheckpointError, match=rf"{NAME}: .*{message}"):
            read(reader, "w4a16", memory, 8, 64)


@pytest.mark.parametrize("disk", FORMATS)
def test_only_native_matrices_are_converted(disk: str, tmp_path: Path) -> None:
    tensors = {f"{NAME}.{part}": tensor for part, tensor in WRITERS[disk](torch.randn(8, 64)).items()}
    reader = MatrixReader(Checkpoint(save_checkpoint(tmp_path, {}, tensors, QUANTIZATION[disk])), CpuConverter(1))
    assert memory_formats(disk)[0] == disk
    for memory in FORMATS:
        if memory in memory_formats(disk):
            read(reader, disk, memory, 8, 64)
        else:
            with pytest.raises(ValueError, match=f"{disk} cannot be read as {memory}"):
                read(reader, disk, memory, 8, 64)
