"""A worker's memory: what it may take, what the work on a matrix needs of it, and what it took."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable
from pathlib import Path

from ...actors.statistics import Statistics
from ..byte_sizes import parse_bytes
from .error_feedback import ROW_GROUP
from .matrix import QuantizeError
from .plan import MatrixPlan
from .quark_quantizer import quark_bytes
from .safetensors_writer import WRITE_BEHIND

DEFAULT = "4 GB"

COPY_CHUNK = 8 << 20
"""Bytes of a copied tensor that are read at a time."""
_LEAST = 128 << 20

# Bytes a weight of the float32 rows that are rounded at a time, with all copies that the search makes of them.
_ROUNDING = 64
_PIECE_WEIGHTS = 16 << 20
# Of what is planned with; the rest is for what the allocator keeps between pieces.
_SHARE = 0.75


def parse_memory(text: str) -> int:
    """Bytes of "4 GB", "512 MiB". Raises QuantizeError for a size that no work fits in."""
    size = parse_bytes(text)
    if size is None:
        raise QuantizeError(f'memory {text!r}: must be a size, as "4 GB" or "512 MiB"')
    if size < _LEAST:
        raise QuantizeError(f"memory {text!r}: a worker needs at least {_LEAST >> 20} MiB")
    return size


class MemoryBudget:
    """What a worker may hold at a time. reserved: bytes of it that calibration takes."""

    def __init__(self, memory: int, reserved: int = 0) -> None:
        self.memory = memory
        self.limit = int(memory * _SHARE) - reserved - WRITE_BEHIND - 2 * COPY_CHUNK

    def check(self, matrices: Iterable[MatrixPlan]) -> None:
        """Raises QuantizeError for the first that does not fit."""
        seen = set()
        for matrix in matrices:
            kind = (matrix.rows, matrix.columns, matrix.source_bytes, matrix.scheme.format, matrix.scheme.by)
            if kind not in seen:
                seen.add(kind)
                self.rows(matrix)

    def rows(self, matrix: MatrixPlan) -> int:
        """How many rows of a matrix are worked on at a time: all of them, or a multiple of what is rounded together.

        Raises QuantizeError, naming the matrix, if its format wants all of them at a time and they do not fit.
        """
        most = self._fitting_rows(matrix)
        if matrix.scheme.by == "quark" or matrix.scheme.format == "w4a8-channel" or most < ROW_GROUP:
            return most
        # Beyond this more rows at a time make nothing faster.
        useful = _PIECE_WEIGHTS // matrix.columns // ROW_GROUP * ROW_GROUP
        return min(most, max(useful, ROW_GROUP))

    def _fitting_rows(self, matrix: MatrixPlan) -> int:
        if self.needed(matrix, matrix.rows) <= self.limit:
            return matrix.rows
        step = ROW_GROUP
        if matrix.scheme.format == "w4a8-channel" or self.needed(matrix, step) > self.limit:
            rows = matrix.rows if matrix.scheme.format == "w4a8-channel" else step
            needed = (self.needed(matrix, rows) + self.memory - self.limit) / 1e6
            raise QuantizeError(
                f"{matrix.name}: {rows} rows of {matrix.columns} columns in {matrix.scheme.format} need "
                f"{needed:,.0f} MB of a worker's memory; give more with --memory"
            )
        while self.needed(matrix, 2 * step) <= self.limit:
            step *= 2
        return step

    def needed(self, matrix: MatrixPlan, rows: int) -> int:
        """Bytes for some rows: their source, what is read ahead, what comes of them, and what is made in between."""
        share = rows / matrix.rows
        source = matrix.source_bytes * share
        if matrix.scheme.by == "quark":
            return int(source) + quark_bytes(matrix.scheme.format, [(rows, matrix.columns)])
        made = sum(spec.bytes for spec in matrix.specs.values()) * share
        # Twice the source because the next is read ahead; made three times: in chunks, joined, and while written.
        return int(2 * source + 3 * made) + min(rows, ROW_GROUP) * matrix.columns * _ROUNDING


def calibration_bytes(calibration: Path | None) -> int:
    """What a calibration takes of a worker's memory: one layer's statistics and, for error feedback, the moments of
    one matrix with all that is made of them (float64 as read, smoothed, and three copies while they are inverted)."""
    if calibration is None:
        return 0
    plan = Statistics.open(calibration).plan
    sizes = plan.hidden_size, plan.inner_size
    moments = sum(min(plan.moments_block, size) * size for size in sizes)
    return 24 * plan.num_experts * sum(sizes) + 40 * moments


def peak_memory() -> int:
    """Bytes of resident memory that this process had at most since `reset_peak`."""
    return _status("VmHWM")


def resident_memory() -> int:
    """Bytes of resident memory now."""
    return _status("VmRSS")


def trim_memory(above: int) -> None:
    """Gives freed memory back to the system if more than so many bytes are resident. glibc keeps what is freed between
    what is not, which in the course of a file may grow to several times what is in use."""
    if resident_memory() > above:
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Begins `peak_memory` anew (proc(5), /proc/pid/clear_refs); where that is forbidden it is of the whole process."""
    with contextlib.suppress(PermissionError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) << 10
    raise QuantizeError(f"/proc/self/status has no {key}")
