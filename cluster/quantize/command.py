"""`flyray quantize`: plans and checks everything, runs the files as Ray tasks, writes metadata, reports."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray
from rich.console import Console

from ...actors.checkpoint import INDEX, Checkpoint
from ..figures import write_figures
from .matrix import QuantizeError
from .plan import QuantizePlan, check_space, check_target, plan_quantization
from .quark_quantizer import SCHEMES, require_quark
from .report import QuantizeReport, tables
from .task_pool import run_plans


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
        for plan in plans:
            plan.target.mkdir(parents=True, exist_ok=True)
            _remove_old_checkpoint(plan)
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


def _remove_old_checkpoint(plan: QuantizePlan) -> None:
    """With --overwrite, what a checkpoint in the target folder consists of; config.json first, so that what remains
    after an interruption does not open. Other files stay."""
    for name in ("config.json", INDEX):
        (plan.target / name).unlink(missing_ok=True)
    for file in plan.target.glob("*.safetensors"):
        file.unlink()


@contextlib.contextmanager
def _ray(workers: int | None) -> Iterator[int]:
    """The caller's Ray, or a local one of our own; yields its number of CPUs."""
    own = not ray.is_initialized()
    if own:
        ray.init(
            address="local",
            num_cpus=workers or os.cpu_count() or 1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < 1:
            raise QuantizeError("the Ray cluster has no CPU to run a task on")
        yield cpus
    finally:
        if own:
            ray.shutdown()
