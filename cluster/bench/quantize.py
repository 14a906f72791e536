"""`flyray bench quantize`: the rate of a recipe on a checkpoint, beside `cp` of the same files in turns."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ...actors.checkpoint import Checkpoint
from ..figures import Figure
from ..quantize.command import QuantizeReport, quantize
from ..quantize.recipe import Recipe
from .copying import forget, seconds_to_copy


@dataclass(frozen=True)
class QuantizeBench:
    """Medians of `runs` runs in turns, the source read from the disk each time. copy_seconds: of `cp` and fsync."""

    recipe: str
    runs: int
    bytes_before: int
    bytes_after: int
    seconds: float
    copy_seconds: float
    peak_memory: int

    @property
    def share_of_copy(self) -> float:
        """The recipe's rate over the copy's, by the source's bytes."""
        return self.copy_seconds / self.seconds

    def figures(self) -> list[Figure]:
        """quantize_rate.RECIPE, copy_rate, share_of_copy.RECIPE, peak_memory.quantize.RECIPE."""
        return [
            Figure(f"quantize_rate.{self.recipe}", self.bytes_before / self.seconds, "bytes/s"),
            Figure("copy_rate", self.bytes_before / self.copy_seconds, "bytes/s"),
            Figure(f"share_of_copy.{self.recipe}", self.share_of_copy, "1"),
            Figure(f"peak_memory.quantize.{self.recipe}", self.peak_memory, "bytes"),
        ]

    def table(self) -> Table:
        """The figures for people."""
        table = Table(title=f"{self.recipe}: median of {self.runs}, source read from disk, result on disk")
        for column in ("", "seconds", "MB/s of the source", "of cp"):
            table.add_column(column, justify="right" if column else "left")
        for name, seconds in (("cp -r, fsync", self.copy_seconds), ("flyray quantize", self.seconds)):
            rate = f"{self.bytes_before / seconds / 1e6:,.0f}"
            table.add_row(name, f"{seconds:.1f}", rate, f"{self.copy_seconds / seconds:.0%}")
        table.caption = f"{self.bytes_before / 1e9:.2f} GB; peak memory of a worker {self.peak_memory / 1e9:.2f} GB"
        return table


def bench_quantize(
    source: Path,
    work_dir: Path,
    recipe: Recipe,
    *,
    runs: int = 3,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> QuantizeBench:
    """Quantizes and copies in turns in a folder of work_dir, which is removed. Raises what `quantize` and `Checkpoint`
    raise, before anything is copied."""
    Checkpoint(source)
    copies: list[float] = []
    reports: list[QuantizeReport] = []
    folder = work_dir / "flyray-bench"
    folder.mkdir(parents=True)
    try:
        for run in range(runs):
            forget(source)
            copies.append(seconds_to_copy(source, folder / "copy"))
            forget(source)
            reports.append(quantize(source, folder / "made", recipe, workers=workers))
            shutil.rmtree(folder / "made")
            say(f"run {run + 1}: cp {copies[-1]:.1f} s, {recipe.name} {reports[-1].seconds:.1f} s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return QuantizeBench(
        recipe=recipe.name,
        runs=runs,
        bytes_before=reports[0].bytes_before,
        bytes_after=reports[0].bytes_after,
        seconds=statistics.median(report.seconds for report in reports),
        copy_seconds=statistics.median(copies),
        peak_memory=max(report.peak_memory for report in reports),
    )
