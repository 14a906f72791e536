"""What a quantizing run did, as tables and as figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from ..figures import Figure
from .location import Location
from .manifest import FileRecord, MatrixError

_WORST = 5
_NAMED = 20


@dataclass(frozen=True)
class QuantizeReport:
    """bytes: tensor data before and after. weight_error: relative Frobenius norm over all that was quantized, per_kind
    by projection, per_format by format and projection where there are several formats; worst: the five worst matrices.
    uncalibrated: matrices that calibration did not reach. predicted: of a mixed choice, its loss in KL divergence.
    peak_memory: bytes of resident memory of a worker at most, work_memory: of them, those above what it had before.
    nodes: Ray's ids of where files were made.

    Of this run alone (the others are of the whole checkpoint): seconds, from the start of its first file to the end of
    its last; bytes_read, of the source; kept_files, finished by an earlier run; import_seconds, what importing Quark
    took before that, 0 where another format had imported it already.
    """

    label: str
    format: str
    source_format: str
    target: Location
    bytes_before: int
    bytes_after: int
    seconds: float
    bytes_read: int
    kept_files: int
    import_seconds: float
    weight_error: float
    per_kind: dict[str, float]
    per_format: dict[str, dict[str, float]]
    worst: tuple[MatrixError, ...]
    uncalibrated: tuple[str, ...]
    predicted: float | None
    peak_memory: int
    work_memory: int
    nodes: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Bytes of the source a second."""
        return self.bytes_read / self.seconds if self.seconds else 0.0

    def figures(self) -> list[Figure]:
        """weight_error.LABEL (and .KIND, .FORMAT, .FORMAT.KIND), bytes.LABEL, peak_memory.quantize.LABEL, and of what
        this run did seconds.quantize.LABEL and rate.quantize.LABEL."""
        error = f"weight_error.{self.label}"
        found = [Figure(error, self.weight_error, "1")]
        found += [Figure(f"{error}.{kind}", value, "1") for kind, value in self.per_kind.items()]
        for format, kinds in self.per_format.items():
            found += [Figure(f"{error}.{format}.{kind}", value, "1") for kind, value in kinds.items()]
        found.append(Figure(f"bytes.{self.label}", self.bytes_after, "bytes"))
        found.append(Figure(f"peak_memory.quantize.{self.label}", self.peak_memory, "bytes"))
        found.append(Figure(f"work_memory.quantize.{self.label}", self.work_memory, "bytes"))
        if self.bytes_read:
            found.append(Figure(f"seconds.quantize.{self.label}", self.seconds, "seconds"))
            found.append(Figure(f"rate.quantize.{self.label}", self.rate, "bytes/s"))
        return found


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


def per_format(errors: Sequence[MatrixError]) -> dict[str, dict[str, float]]:
    """per_kind of each format; nothing if there is one only."""
    formats = sorted({error.format for error in errors})
    if len(formats) < 2:
        return {}
    return {format: per_kind([error for error in errors if error.format == format]) for format in formats}


def worst(errors: Sequence[MatrixError]) -> tuple[MatrixError, ...]:
    """The matrices with the largest relative error, worst first."""
    return tuple(sorted(errors, key=lambda error: -error.relative)[:_WORST])


def nodes_of(records: Iterable[FileRecord]) -> tuple[str, ...]:
    return tuple(sorted({record.node for record in records if record.node}))


def tables(reports: Sequence[QuantizeReport]) -> list[Table]:
    """Sizes and errors of the runs, and their worst matrices."""
    importing = max((report.import_seconds for report in reports), default=0.0)
    caption = f"before that, {importing:.1f} s importing AMD Quark" if importing else None
    numbers = ("MB before", "MB after", "seconds", "MB/s", "MB of memory")
    summary = _table("Quantized checkpoints", ("recipe", "format", "from"), numbers, caption)
    matrices = _table("Worst matrices", ("recipe", "matrix"), ("weight error",))
    for report in reports:
        sizes = (f"{size / 1e6:,.1f}" for size in (report.bytes_before, report.bytes_after))
        speed = (f"{report.seconds:.1f}", f"{report.rate / 1e6:,.0f}", f"{report.peak_memory / 1e6:,.0f}")
        summary.add_row(report.label, report.format, report.source_format, *sizes, *speed)
        for error in report.worst:
            matrices.add_row(report.label, error.name, f"{error.relative:.3%}")
    return [summary, _errors(reports), matrices]


def remarks(reports: Sequence[QuantizeReport]) -> list[str]:
    """What else a reader should know."""
    lines = []
    for report in reports:
        if report.kept_files:
            lines.append(f"{report.label}: went on where it was stopped, with {report.kept_files} files finished")
        if report.predicted is not None:
            lines.append(f"{report.label}: the sensitivity file predicts {report.predicted:.4f} nats a token of loss")
        if report.uncalibrated:
            names = ", ".join(report.uncalibrated[:_NAMED])
            more = len(report.uncalibrated) - _NAMED
            rest = f" and {more} more (quantize.json names them)" if more > 0 else ""
            lines.append(f"{report.label}: calibration never reached {names}{rest}; these were rounded without it")
    return lines


def _errors(reports: Sequence[QuantizeReport]) -> Table:
    kinds = list(dict.fromkeys(kind for report in reports for kind in report.per_kind))
    table = _table("Weight error (relative Frobenius norm)", ("recipe", "format"), ("all", *kinds))
    for report in reports:
        cells = _cells(report.per_kind, kinds)
        table.add_row(report.label, report.format, f"{report.weight_error:.3%}", *cells)
        for format, of_kinds in report.per_format.items():
            table.add_row("", format, "", *_cells(of_kinds, kinds))
    return table


def _cells(of_kinds: dict[str, float], kinds: Sequence[str]) -> list[str]:
    return [f"{of_kinds[kind]:.3%}" if kind in of_kinds else "" for kind in kinds]


def _table(title: str, words: Iterable[str], numbers: Iterable[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    for column in words:
        table.add_column(column, overflow="fold")  # names are read whole in a narrow terminal too
    for column in numbers:
        table.add_column(column, justify="right")
    return table
