"""The demo's first half: the model in every format, and what each format costs in quality; made once, then kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console

from ...actors.checkpoint import Checkpoint
from ..code_version import code_version, digest
from ..evaluate.command import FORMATS, EvalSettings, columns_of, measure_columns, read_material
from ..evaluate.kept_quality import KeptQuality, load_quality
from ..evaluate.quantized_cache import QUANTIZED_FORMATS, KeptCheckpoint, QuantizedCache
from ..evaluate.table import Row, figures, quality_table
from ..figures import Figure
from ..job import job_ray
from .files import DEMO_MODEL, DEMO_TASKS, DEMO_TEXT

# Enough to tell the formats apart, within a minute and a half on two cores.
SETTINGS = EvalSettings(tasks=4, text_bytes=48_000, lanes=2)
MEASURING_CODE = ("kernels", "actors", "cluster")


@dataclass(frozen=True)
class DemoQuality:
    """The quantized checkpoints by format, and the measured quality. fresh: measured in this run."""

    kept: dict[str, KeptCheckpoint]
    quality: KeptQuality
    fresh: bool

    def figures(self) -> list[Figure]:
        """weight_error.FORMAT, bytes.FORMAT and all of the evaluation's."""
        quantized = [figure for kept in self.kept.values() for figure in kept.figures()]
        native = Figure("bytes.w4a16", tensor_bytes(DEMO_MODEL), "bytes")
        seconds = Figure("seconds.evaluate", self.quality.seconds, "seconds")
        return [*quantized, native, *figures(self.quality.scores), seconds]

    def print(self, console: Console) -> None:
        """The quality table, and when it was measured if not now."""
        labels = [score.label for score in self.quality.scores]
        console.print(quality_table(self.quality.scores, extra=size_rows(labels, self.kept)))
        if not self.fresh:
            console.print(f"Measured on {self.quality.date} and kept, as model and code are the same.", style="dim")


def demo_quality(work_dir: Path, console: Console, *, keep_logs: bool = False) -> DemoQuality:
    """Quantizes and measures what is not in work_dir yet. Raises what quantizing and evaluating raise, and Stopped."""
    cache = QuantizedCache(work_dir, DEMO_MODEL)
    path = cache.folder / "quality.json"
    key = f"{code_version(*MEASURING_CODE)}-{digest([DEMO_TEXT, DEMO_TASKS])}"
    kept = {format: found for format in QUANTIZED_FORMATS if (found := cache.kept(format))}
    quality = load_quality(path, key)
    if quality and len(kept) == len(QUANTIZED_FORMATS):
        return DemoQuality(kept, quality, fresh=False)
    material = read_material(DEMO_TEXT, DEMO_TASKS, SETTINGS)
    with job_ray(SETTINGS.cpus, keep_logs=keep_logs) as end_now:
        columns, kept = columns_of(DEMO_MODEL, FORMATS, work_dir)
        begin = time.monotonic()
        scores = measure_columns(columns, material, SETTINGS, console, end_now)
        seconds = time.monotonic() - begin
    date = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    quality = KeptQuality(key, date, seconds, tuple(scores))
    quality.save(path)
    return DemoQuality(kept, quality, fresh=True)


def size_rows(labels: Sequence[str], kept: dict[str, KeptCheckpoint]) -> list[Row]:
    """Rows of the table: megabytes on disk and relative weight error of each format."""
    native = tensor_bytes(DEMO_MODEL)
    sizes = {label: found.bytes for label, found in kept.items()} | {"w4a16": native}
    errors = {label: f"{found.weight_error:.2%}" for label, found in kept.items()} | {"w4a16": "0"}
    return [
        ("MB on disk", [f"{sizes[label] / 1e6:.1f}" if label in sizes else "" for label in labels]),
        ("weight error", [errors.get(label, "") for label in labels]),
    ]


def tensor_bytes(path: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    checkpoint = Checkpoint(path)
    entries = (checkpoint.entry(name) for name in checkpoint.names)
    return sum(entry.end - entry.begin for entry in entries)
