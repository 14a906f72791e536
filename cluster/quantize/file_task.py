"""The work on output files: what a Ray task runs, chunk by chunk, in the memory of a chunk."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .matrix import QuantizeError, dequantize, fold
from .plan import FilePlan, MatrixPlan
from .quark_quantizer import SCHEMES, import_quark, quark_quantize
from .safetensors_writer import SafetensorsWriter

# 64M weights are 256 MB as float32, of which Quark and the error measurement hold about four copies at a time.
CHUNK_WEIGHTS = 64 << 20
# Weights compared at a time: their float64 copies stay in cache, which is five times as fast as a whole matrix.
_MEASURE_WEIGHTS = 1 << 19


@dataclass(frozen=True)
class MatrixError:
    """How far a quantized matrix is from its source: squared Frobenius norms of the difference and of the source."""

    name: str
    kind: str
    difference: float
    norm: float

    @property
    def relative(self) -> float:
        return math.sqrt(self.difference / self.norm) if self.norm else math.sqrt(self.difference)


@dataclass(frozen=True)
class ChunkDone:
    """Sent after every chunk of the file `target`; complete with the last one, when the file has its final name.
    quark_config: the quantization_config that Quark wrote, or None without Quark. started, ended: seconds since the
    epoch. import_seconds: what importing Quark took before, in the first message of a task."""

    target: Path
    source_bytes: int
    errors: tuple[MatrixError, ...]
    quark_config: dict[str, Any] | None
    started: float
    ended: float
    complete: bool = False
    import_seconds: float = 0.0


def quantize_files(plans: Sequence[FilePlan], chunk_weights: int = CHUNK_WEIGHTS) -> Iterator[ChunkDone]:
    """Writes the files one after the other. An error, or dropping the iterator, leaves no unfinished file."""
    import_seconds = 0.0
    if any(plan.format in SCHEMES for plan in plans):
        started = time.time()
        import_quark()
        import_seconds = time.time() - started
    for plan in plans:
        for done in _quantize_file(plan, chunk_weights):
            yield replace(done, import_seconds=import_seconds)
            import_seconds = 0.0


def _quantize_file(plan: FilePlan, chunk_weights: int) -> Iterator[ChunkDone]:
    started = time.time()
    with SafetensorsWriter(plan.target, plan.specs) as writer:
        for name, entry in plan.copies.items():
            writer.copy(name, entry)
        copied = sum(entry.bytes for entry in plan.copies.values())
        yield ChunkDone(plan.target, copied, (), None, started, time.time())
        for matrices in _chunks(plan.matrices, chunk_weights):
            started = time.time()
            errors, quark_config = _quantize_chunk(plan, matrices, writer)
            done = sum(entry.bytes for matrix in matrices for entry in matrix.source.values())
            yield ChunkDone(plan.target, done, errors, quark_config, started, time.time())
        started = time.time()
        writer.commit()
    yield ChunkDone(plan.target, 0, (), None, started, time.time(), complete=True)


def _quantize_chunk(
    plan: FilePlan, matrices: Sequence[MatrixPlan], writer: SafetensorsWriter
) -> tuple[tuple[MatrixError, ...], dict[str, Any] | None]:
    made: dict[str, dict[str, Tensor]] = {}
    quark_config = None
    if plan.format in SCHEMES:
        made, quark_config = quark_quantize(plan.format, plan.source_format, plan.config, plan.prefix, matrices)
    errors = []
    for matrix in matrices:
        source = matrix.read()
        parts = made.pop(matrix.name) if quark_config is not None else _fold(plan, matrix, source)
        errors.append(_measure(plan, matrix, source, parts))
        for part, tensor in parts.items():
            name = f"{plan.prefix}{matrix.name}.{part}"
            if name not in plan.specs:
                raise QuantizeError(f"{name} came out of {plan.format}, which has no such tensor")
            writer.write(name, tensor)
    return tuple(errors), quark_config


def _fold(plan: FilePlan, matrix: MatrixPlan, source: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return fold(plan.source_format, source)
    except ValueError as error:
        raise QuantizeError(f"{matrix.name}: {error}") from error


def _measure(plan: FilePlan, matrix: MatrixPlan, source: dict[str, Tensor], parts: dict[str, Tensor]) -> MatrixError:
    difference = norm = 0.0
    step = max(1, _MEASURE_WEIGHTS // matrix.columns)
    for first in range(0, matrix.rows, step):
        rows = slice(first, first + step)
        want = dequantize(plan.source_format, _rows(source, rows, matrix.rows)).double()
        got = dequantize(plan.format, _rows(parts, rows, matrix.rows)).double()
        difference += float((got - want).square_().sum())
        norm += float(want.square_().sum())
    if not math.isfinite(difference):
        raise QuantizeError(f"{matrix.name}: {plan.format} gives weights that are not finite")
    return MatrixError(matrix.name, matrix.kind, difference, norm)


def _rows(parts: dict[str, Tensor], rows: slice, count: int) -> dict[str, Tensor]:
    """The rows of every tensor that has one entry or more a row; others (a scale of the whole matrix) as they are."""
    return {part: tensor[rows] if tensor.shape[:1] == (count,) else tensor for part, tensor in parts.items()}


def _chunks(matrices: Sequence[MatrixPlan], chunk_weights: int) -> Iterator[list[MatrixPlan]]:
    chunk: list[MatrixPlan] = []
    weights = 0
    for matrix in matrices:
        size = matrix.rows * matrix.columns
        if chunk and weights + size > chunk_weights:
            yield chunk
            chunk, weights = [], 0
        chunk.append(matrix)
        weights += size
    if chunk:
        yield chunk
