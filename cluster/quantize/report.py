"""What a quantizing run did, as a table and as figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..figures import Figure
from .file_task import MatrixError

_WORST = 5


@dataclass(frozen=True)
class QuantizeReport:
    """bytes: tensor data before and after. weight_error: relative Frobenius norm over all experts, per_kind by
    projection; worst: the five worst matrices. seconds: from the start of its first file to the end of its last.
    import_seconds: what importing Quark took before that, 0 where another format had imported it already."""

    format: str
    source_format: str
    target: Path
    bytes_before: int
    bytes_after: int
    seconds: float
    import_seconds: float
    weight_error: float
    per_kind: dict[str, float]
    worst: tuple[MatrixError, ...]

    def figures(self) -> list[Figure]:
        """weight_error.FORMAT (and .KIND), bytes.FORMAT, seconds.quantize.FORMAT."""
        return [
            Figure(f"weight_error.{self.format}", self.weight_error, "1"),
            *(Figure(f"weight_error.{self.format}.{kind}", error, "1") for kind, error in self.per_kind.items()),
            Figure(f"bytes.{self.format}", self.bytes_after, "bytes"),
            Figure(f"seconds.quantize.{self.format}", self.seconds, "seconds"),
        ]


def relative_error(errors: Iterable[MatrixError]) -> float:
    """Relative Frobenius norm of the difference over several matrices taken as one."""
    errors = tuple(errors)
    norm = sum(error.norm for error in errors)
    difference = sum(error.difference for error in errors)
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)


def per_kind(errors: Sequence[MatrixError]) -> dict[str, float]:
    """relative_error of each projection."""
    kinds = sorted({error.kind for error in errors})
    return {kind: relative_error(error for error in errors if error.kind == kind) for kind in kinds}


def worst(errors: Sequence[MatrixError]) -> tuple[MatrixError, ...]:
    """The matrices with the largest relative error, worst first."""
    return tuple(sorted(errors, key=lambda error: (-error.relative, error.name))[:_WORST])


def tables(reports: Sequence[QuantizeReport]) -> list[Table]:
    """The summary of all reports, their weight errors by projection, and each one's worst matrices."""
    kinds = sorted({kind for report in reports for kind in report.per_kind})
    importing = max(report.import_seconds for report in reports)
    caption = f"before that, {importing:.1f} s importing AMD Quark" if importing else None
    summary = _table("Quantized checkpoints", ("format", "from"), ("MB before", "MB after", "seconds"), caption)
    errors = _table("Weight error (relative Frobenius norm)", ("format",), ("all", *kinds))
    matrices = _table("Worst matrices", ("format", "matrix"), ("weight error",))
    for report in reports:
        sizes = (f"{size / 1e6:,.1f}" for size in (report.bytes_before, report.bytes_after))
        summary.add_row(report.format, report.source_format, *sizes, f"{report.seconds:.1f}")
        per_kind = (f"{report.per_kind[kind]:.3%}" for kind in kinds)
        errors.add_row(report.format, f"{report.weight_error:.3%}", *per_kind)
        for error in report.worst:
            matrices.add_row(report.format, error.name, f"{error.relative:.3%}")
    return [summary, errors, matrices]


def _table(title: str, words: Iterable[str], numbers: Iterable[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    for column in words:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    return table
