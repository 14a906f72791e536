"""`flyray quantize`: plans and checks everything, runs the files as Ray tasks, writes metadata, reports."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console

from ...actors.checkpoint import Checkpoint
from ..figures import write_figures
from ..local_ray import LocalRay
from .matrix import QuantizeError
from .plan import QuantizePlan, check_space, check_target, plan_quantization
from .quark_quantizer import SCHEMES, require_quark
from .report import QuantizeReport, tables


def run(
    src: str | Path,
    dst: str | Path,
    format: str,
    workers: int | None = None,
    json_path: str | Path | None = None,
    overwrite: bool = False,
) -> QuantizeReport:
    """The command: quantizes with a progress bar, prints the report, and writes its figures to `json_path`."""
    report = quantize(src, dst, format, workers=workers, overwrite=overwrite)
    console = Console()
    for table in tables([report]):
        console.print(table)
    if json_path is not None:
        write_figures(json_path, report.figures())
    return report


def quantize(
    src: str | Path,
    dst: str | Path,
    format: str,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> QuantizeReport:
    """Quantizes the checkpoint folder `src` into the folder `dst`; see `quantize_all`."""
    return quantize_all(src, {format: dst}, workers=workers, overwrite=overwrite, progress=progress)[format]


def quantize_all(
    src: str | Path,
    targets: Mapping[str, str | Path],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, QuantizeReport]:
    """Quantizes `src` into several formats at once, {format: folder}, so that each worker imports Quark once.

    Runs in the Ray that the caller has initialized, whose nodes must all see both folders, or in a local one of its
    own that ends with it. `workers` tasks run at a time (default: a CPU each). Everything is checked before
    anything is written; on an error or Ctrl-C the target folders are left without a checkpoint.

    Raises QuantizeError (formats, dimensions, folders, disk space, Quark missing or failing) and CheckpointError.
    """
    if workers is not None and workers < 1:
        raise QuantizeError(f"workers is {workers}, must be at least 1")
    if not targets:
        raise QuantizeError("no format was asked for")
    plans = _plans(Path(src), {format: Path(dst) for format, dst in targets.items()}, overwrite)
    if any(plan.format in SCHEMES for plan in plans):
        require_quark()
    with _ray(workers) as cpus:
        from .task_pool import run_plans

        reports = run_plans(plans, min(workers or cpus, cpus), progress)
    return {report.format: report for report in reports}


def _plans(src: Path, targets: Mapping[str, Path], overwrite: bool) -> list[QuantizePlan]:
    folders = [dst.resolve() for dst in targets.values()]
    for dst in targets.values():
        check_target(src, dst, overwrite)
        if folders.count(dst.resolve()) > 1:
            raise QuantizeError(f"{dst}: two formats cannot share a folder")
    checkpoint = Checkpoint(src)
    plans = [plan_quantization(checkpoint, dst, format) for format, dst in targets.items()]
    needed: dict[int, int] = {}
    for plan in plans:
        device = _device(plan.target)
        needed[device] = needed.get(device, 0) + plan.target_bytes
        check_space(plan.target, needed[device])
    return plans


def _device(path: Path) -> int:
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists()).stat().st_dev


@contextlib.contextmanager
def _ray(workers: int | None) -> Iterator[int]:
    """The caller's Ray, or a local one of our own; yields its number of CPUs."""
    with contextlib.ExitStack() as stack:
        # LocalRay must be entered before ray is imported, so ray is imported inside functions here.
        loaded = sys.modules.get("ray")
        if loaded is None or not loaded.is_initialized():
            stack.enter_context(LocalRay(workers or os.cpu_count() or 1))
        import ray

        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < 1:
            raise QuantizeError("the Ray cluster has no CPU to run a task on")
        yield cpus
