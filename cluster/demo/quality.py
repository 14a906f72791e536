"""The demo's first half: the model in every format, and what each format costs in quality; made once, then kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console

from ..code_version import code_version, digest
from ..evaluate.command import measure_columns, read_material
from ..evaluate.kept_quality import KeptQuality, load_quality
from ..evaluate.quantized_cache import KeptCheckpoint, QuantizedCache
from ..evaluate.recipe_inputs import Calibrating
from ..evaluate.selection import FORMATS, select
from ..evaluate.settings import EvalSettings
from ..evaluate.table import figures, quality_tables
from ..figures import Figure
from ..job import job_ray
from ..quantize.matrix import TARGET_FORMATS
from ..quantize.recipe import load_recipe
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
        """weight_error.FORMAT, seconds.quantize.FORMAT and all of the evaluation's."""
        quantized = [figure for kept in self.kept.values() for figure in kept.figures()]
        seconds = Figure("seconds.evaluate", self.quality.seconds, "seconds")
        return [*quantized, *figures(self.quality.scores), seconds]

    def print(self, console: Console) -> None:
        """The quality table, and when it was measured if not now."""
        errors = {label: kept.weight_error for label, kept in self.kept.items()}
        for table in quality_tables(self.quality.scores, errors):
            console.print(table)
        if not self.fresh:
            console.print(f"Measured on {self.quality.date} and kept, as model and code are the same.", style="dim")


def demo_quality(work_dir: Path, console: Console, *, keep_logs: bool = False) -> DemoQuality:
    """Quantizes and measures what is not in work_dir yet. Raises what quantizing and evaluating raise, and Stopped."""
    cache = QuantizedCache(work_dir, DEMO_MODEL)
    path = cache.folder / "quality.json"
    key = f"{code_version(*MEASURING_CODE)}-{digest([DEMO_TEXT, DEMO_TASKS])}"
    kept = {format: found for format in TARGET_FORMATS if (found := cache.kept(load_recipe(format)))}
    quality = load_quality(path, key)
    if quality and len(kept) == len(TARGET_FORMATS):
        return DemoQuality(kept, quality, fresh=False)
    material = read_material(DEMO_TEXT, DEMO_TASKS, SETTINGS)
    with job_ray(SETTINGS.cpus, keep_logs=keep_logs) as end_now:
        selection = select(DEMO_MODEL, FORMATS, work_dir, Calibrating(None, None, SETTINGS, console, end_now))
        kept = selection.kept
        begin = time.monotonic()
        scores = measure_columns(selection.columns, material, SETTINGS, work_dir, console, end_now)
        seconds = time.monotonic() - begin
    date = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    quality = KeptQuality(key, date, seconds, tuple(scores))
    quality.save(path)
    return DemoQuality(kept, quality, fresh=True)
