"""The work on output files: what a Ray task runs, piece by piece, in the memory that it was given."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...actors.statistics import Statistics
from ...kernels.quantizer import WeightQuantizer
from ...kernels.select import select_quantizer
from .calibrated import Calibrated
from .error_feedback import ROW_GROUP
from .manifest import FileRecord, MatrixError
from .matrix import QuantizeError
from .memory import MemoryBudget, peak_memory, reset_peak, resident_memory, trim_memory
from .pieces import CopyPiece, Piece, QuarkPiece, RowsPiece, cut
from .plan import FilePlan
from .quark_quantizer import import_quark, quark_round
from .rounding import QuantizedMatrix, quantize_matrix
from .safetensors_writer import SafetensorsWriter
from .source_reader import SourceReader, read_ahead, rows_of
from .target_folder import target_folder
from .weight_error import squared_error

_REPORT_BYTES = 64 << 20


@dataclass(frozen=True)
class WorkSettings:
    """budget: of memory, beyond what the process has before the work. calibration: a statistics folder."""

    budget: MemoryBudget
    calibration: Path | None = None
    smoothing: float | None = None

    def calibrated(self) -> Calibrated | None:
        if self.calibration is None:
            return None
        return Calibrated(Statistics.open(self.calibration), self.smoothing)


@dataclass(frozen=True)
class FileProgress:
    """Of the file `path`. source_bytes: done so far. record: when it has its final name. started, ended: seconds since
    the epoch. import_seconds: what importing Quark took before, in the first message of a task."""

    path: str
    source_bytes: int
    started: float
    ended: float
    record: FileRecord | None = None
    import_seconds: float = 0.0


def quantize_files(plans: Sequence[FilePlan], settings: WorkSettings) -> Iterator[FileProgress]:
    """Writes the files one after the other. An error, or dropping the iterator, leaves no unfinished file."""
    import_seconds = 0.0
    if any(plan.by_quark for plan in plans):
        started = time.time()
        import_quark()
        import_seconds = time.time() - started
    calibrated = settings.calibrated()
    quantizer = select_quantizer("cpu", threads=1)
    for plan in plans:
        for progress in _FileWork(plan, settings, calibrated, quantizer).run():
            yield replace(progress, import_seconds=import_seconds)
            import_seconds = 0.0


class _FileWork:
    """One file from its first byte to its record."""

    def __init__(
        self, plan: FilePlan, settings: WorkSettings, calibrated: Calibrated | None, quantizer: WeightQuantizer
    ) -> None:
        self._plan = plan
        self._specs = plan.specs
        self._settings = settings
        self._calibrated = calibrated
        self._quantizer = quantizer
        self._made: dict[tuple[str, int], QuantizedMatrix] = {}
        # Of the matrix that is written now: what comes after its first tensor, and its sums so far.
        self._rest: dict[str, list[Tensor]] = {}
        self._sums = (0.0, 0.0)
        self._errors: list[MatrixError] = []
        self._uncalibrated: dict[str, None] = {}

    def run(self) -> Iterator[FileProgress]:
        reset_peak()
        started, baseline, done, told = time.time(), resident_memory(), 0, 0
        folder = target_folder(self._plan.target)
        trim_above = baseline + self._settings.budget.limit // 2
        pieces = list(cut(self._plan.items, self._settings.budget, self._settings.smoothing is not None))
        with (
            folder.staging() as staging,
            SourceReader() as reader,
            SafetensorsWriter(staging / self._plan.name, self._specs) as writer,
        ):
            loads = (functools.partial(_load, piece, reader) for piece in pieces)
            for piece, data in zip(pieces, read_ahead(loads), strict=True):
                done += self._take(piece, data, writer)
                trim_memory(trim_above)
                if done - told >= _REPORT_BYTES:
                    told = done
                    yield FileProgress(str(self._plan.path), done, started, time.time())
            size, digest = writer.commit()
            folder.publish(staging / self._plan.name)
        record = FileRecord(
            bytes=size,
            sha256=digest,
            source_bytes=done,
            seconds=time.time() - started,
            peak_memory=peak_memory(),
            baseline=baseline,
            node=_node(),
            matrices=tuple(self._errors),
            uncalibrated=tuple(self._uncalibrated),
        )
        yield FileProgress(str(self._plan.path), done, started, time.time(), record)

    def _take(self, piece: Piece, data: Any, writer: SafetensorsWriter) -> int:
        """Works on one piece; returns how many bytes of the source are thereby done."""
        if isinstance(piece, CopyPiece):
            writer.write_bytes(piece.copy.stored_name, self._copied(piece, data))
            return piece.high - piece.low
        if isinstance(piece, QuarkPiece):
            self._round_by_quark(piece, data)
            return 0
        made = self._made.pop((piece.matrix.name, piece.low), None) or self._round(piece, data)
        self._write(piece, made, writer)
        return piece.source_bytes

    def _copied(self, piece: CopyPiece, data: memoryview) -> memoryview:
        """The bytes, multiplied as smoothing asks."""
        factor = self._calibrated.copied(piece.copy.name) if self._calibrated is not None else None
        if factor is None:
            return data
        entry = piece.copy.entry
        tensor = torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)
        return tensor.mul_(factor).reshape(-1).view(torch.uint8).numpy().data

    def _round_by_quark(self, piece: QuarkPiece, data: Mapping[str, Mapping[str, Tensor]]) -> None:
        formats = dict.fromkeys(rows.matrix.scheme.format for rows in piece.rows)
        for format in formats:
            chosen = [rows for rows in piece.rows if rows.matrix.scheme.format == format]
            made = quark_round(format, {rows.matrix.name: data[rows.matrix.name] for rows in chosen})
            for rows in chosen:
                matrix, parts = rows.matrix, made.pop(rows.matrix.name)
                source = data[matrix.name]
                sums = _named(
                    rows,
                    lambda m=matrix, r=rows, s=source, p=parts: squared_error(
                        m.source_format, s, m.scheme.format, p, r.high - r.low, m.columns
                    ),
                )
                self._made[matrix.name, rows.low] = QuantizedMatrix(parts, *sums)

    def _round(self, piece: RowsPiece, parts: Mapping[str, Tensor]) -> QuantizedMatrix:
        matrix = piece.matrix
        inputs = self._calibrated.matrix(matrix.name) if self._calibrated is not None else None
        if inputs is not None and inputs.row_factor is not None:
            inputs = replace(inputs, row_factor=inputs.row_factor[piece.low : piece.high])
        return _named(
            piece,
            lambda: quantize_matrix(matrix.scheme, matrix.source_format, parts, inputs, self._quantizer, ROW_GROUP),
        )

    def _write(self, piece: RowsPiece, made: QuantizedMatrix, writer: SafetensorsWriter) -> None:
        """The first tensor of a matrix goes out with every piece, the others, small ones, after its last."""
        matrix = piece.matrix
        stored = f"{self._plan.prefix}{matrix.name}"
        first, *others = matrix.specs
        writer.write(f"{stored}.{first}", made.parts[first])
        self._sums = self._sums[0] + made.difference, self._sums[1] + made.norm
        if made.uncalibrated:
            self._uncalibrated[matrix.name] = None
        for part in others:
            self._rest.setdefault(part, []).append(made.parts[part])
        if not piece.last:
            return
        for part in others:
            tensors = self._rest.pop(part)
            shape = torch.tensor([matrix.rows, matrix.columns], dtype=torch.int32)
            joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors) if part != "weight_shape" else shape
            writer.write(f"{stored}.{part}", joined)
        self._errors.append(MatrixError(matrix.name, matrix.kind, matrix.scheme.format, *self._sums))
        self._sums = (0.0, 0.0)


def _load(piece: Piece, reader: SourceReader) -> Any:
    """What a piece works on: bytes, tensors by part, those by matrix, or nothing."""
    if isinstance(piece, CopyPiece):
        return reader.read_bytes(piece.copy.stored_name, piece.copy.entry, piece.low, piece.high)
    if isinstance(piece, QuarkPiece):
        return {rows.matrix.name: _read_rows(rows, reader) for rows in piece.rows}
    return None if piece.matrix.scheme.by == "quark" else _read_rows(piece, reader)


def _read_rows(piece: RowsPiece, reader: SourceReader) -> dict[str, Tensor]:
    matrix = piece.matrix
    parts = {}
    for part, entry in matrix.source.items():
        if part == "weight_shape":
            _check_shape(piece, reader.read(part, entry))
        else:
            rows = entry if piece.whole else rows_of(entry, piece.low, piece.high)
            parts[part] = reader.read(f"{matrix.name}.{part}", rows)
    return parts


def _check_shape(piece: RowsPiece, stated: Tensor) -> None:
    matrix = piece.matrix
    if stated.tolist() != [matrix.rows, matrix.columns]:
        raise QuantizeError(
            f"{matrix.name}.weight_shape says {stated.tolist()}, but weight_packed holds "
            f"{[matrix.rows, matrix.columns]}; padded matrices cannot be quantized"
        )


def _named(piece: RowsPiece, work: Callable[[], Any]) -> Any:
    """The matrix's name, and the first of the rows if there are others, before what is wrong with it."""
    try:
        return work()
    except (QuantizeError, ValueError) as error:
        where = "" if piece.whole else f", from row {piece.low} on"
        raise QuantizeError(f"{piece.matrix.name}{where}: {error}") from error


def _node() -> str:
    """Ray's id of this node; empty outside of Ray."""
    # Not imported by this module: the driver enters LocalRay before Ray is.
    ray = sys.modules.get("ray")
    return ray.get_runtime_context().get_node_id() if ray is not None and ray.is_initialized() else ""
