"""`flyray quantize`: plans and checks everything, runs the files as Ray tasks, writes metadata, reports."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ...actors.checkpoint import Checkpoint
from ..figures import write_figures
from ..job import job_ray
from .file_task import WorkSettings
from .location import Location, locate
from .manifest import Manifest
from .matrix import QuantizeError
from .memory import DEFAULT, MemoryBudget, calibration_bytes, parse_memory
from .plan import QuantizePlan, check_space, check_target, plan_quantization
from .plan_inputs import QuantizeInputs
from .quantize_run import QuantizeRun
from .quark_quantizer import require_quark
from .recipe import Recipe, load_recipe
from .report import QuantizeReport, remarks, tables
from .resume import find_progress, origin_of, room_there

__all__ = ["QuantizeInputs", "QuantizeReport", "quantize", "quantize_all", "run"]

STOPPED = 130
Place = str | os.PathLike[str] | Location
"""A folder, or an fsspec URL of one."""


def run(
    src: Place,
    dst: Place,
    recipe: str | Path,
    inputs: QuantizeInputs,
    *,
    workers: int | None = None,
    memory: str = DEFAULT,
    overwrite: bool = False,
    ray_address: str = "local",
    json_path: str | Path | None = None,
    keep_logs: bool = False,
) -> int:
    """The command: quantizes with a progress bar, prints the report, and writes its figures to `json_path`. recipe: the
    name of a shipped one, or a YAML file. Raises what `quantize_all` raises. Returns the exit code: 0, or 130 after a
    signal."""
    console = Console()
    try:
        report = quantize(
            src,
            dst,
            load_recipe(recipe),
            inputs,
            workers=workers,
            memory=memory,
            overwrite=overwrite,
            ray_address=ray_address,
            keep_logs=keep_logs,
        )
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on with what is finished in {dst}", soft_wrap=True)
        return STOPPED
    for table in tables([report]):
        console.print(table)
    for remark in remarks([report]):
        console.print(remark)
    if json_path is not None:
        write_figures(json_path, report.figures())
    return 0


def quantize(
    src: Place,
    dst: Place,
    recipe: Recipe,
    inputs: QuantizeInputs | None = None,
    *,
    workers: int | None = None,
    memory: str = DEFAULT,
    overwrite: bool = False,
    ray_address: str = "local",
    keep_logs: bool = False,
    progress: bool = True,
) -> QuantizeReport:
    """Quantizes the checkpoint `src` into the folder `dst`, labelled with the recipe's name; see `quantize_all`."""
    targets = {recipe.name: (recipe, inputs or QuantizeInputs(), dst)}
    reports = quantize_all(
        src,
        targets,
        workers=workers,
        memory=memory,
        overwrite=overwrite,
        ray_address=ray_address,
        keep_logs=keep_logs,
        progress=progress,
    )
    return reports[recipe.name]


def quantize_all(
    src: Place,
    targets: Mapping[str, tuple[Recipe, QuantizeInputs, Place]],
    *,
    workers: int | None = None,
    memory: str = DEFAULT,
    overwrite: bool = False,
    ray_address: str = "local",
    keep_logs: bool = False,
    progress: bool = True,
) -> dict[str, QuantizeReport]:
    """Quantizes `src` by several recipes at once, {label: (recipe, inputs, folder)}, so that each worker imports Quark
    once.

    Runs in the Ray that the caller has initialized; else in the one at `ray_address`, or, where that is "local", in one
    of its own that ends with it (keep_logs: but for Ray's logs). All nodes must see source and targets. `workers` tasks
    run at a time (default: a CPU each), and each takes up to `memory`.
    Everything is checked before anything is written. A run that is stopped, however hard, is continued by the same
    call; it gives the same bytes. Until its end the target is no checkpoint (config.json comes last).

    Raises QuantizeError (recipes, inputs, dimensions, folders, disk space, memory, Quark missing or failing),
    CheckpointError, StatisticsError, SensitivityError and RayAddressError; Stopped when a signal came, in a Ray that it
    connected itself.
    """
    if workers is not None and workers < 1:
        raise QuantizeError(f"workers is {workers}, must be at least 1")
    if not targets:
        raise QuantizeError("no recipe was asked for")
    size = parse_memory(memory)
    plans = _plans(locate(src), targets)
    settings = {plan.label: _settings(plan, size) for plan in plans}
    found = [find_progress(plan, origin_of(plan), overwrite) for plan in plans]
    _check_room(plans, found)
    with _bars(progress) as bars:
        runs = [QuantizeRun(plan, done, bars) for plan, done in zip(plans, found, strict=True)]
        if any(file.by_quark for run in runs for file in run.missing()):
            require_quark()
        return {report.label: report for report in _run(runs, settings, _Cluster(workers, ray_address, keep_logs))}


@dataclass(frozen=True)
class _Cluster:
    """Where tasks run. workers: at a time; None: one a CPU. address, keep_logs: as of `job_ray`."""

    workers: int | None
    address: str
    keep_logs: bool


def _run(runs: Sequence[QuantizeRun], settings: Mapping[str, WorkSettings], cluster: _Cluster) -> list[QuantizeReport]:
    """With every folder held. An error leaves what is finished, to go on with."""
    with contextlib.ExitStack() as stack:
        for each in runs:
            each.plan.folder.create()
            stack.enter_context(each.plan.folder.lock())
        try:
            for each in runs:
                each.begin()
            if left := [each for each in runs if each.missing()]:
                with _ray(cluster) as cpus:
                    from .task_pool import run_files

                    run_files(left, settings, min(cluster.workers or cpus, cpus))
            return [each.finish() for each in runs]
        except BaseException:
            for each in runs:
                each.stop()
            raise


def _plans(src: Location, targets: Mapping[str, tuple[Recipe, QuantizeInputs, Place]]) -> list[QuantizePlan]:
    folders = {label: locate(dst) for label, (_, _, dst) in targets.items()}
    resolved = [str(folder.resolve()) for folder in folders.values()]
    for folder in folders.values():
        check_target(src, folder)
        if resolved.count(str(folder.resolve())) > 1:
            raise QuantizeError(f"{folder}: two recipes cannot share a folder")
    checkpoint = Checkpoint(src)
    return [
        plan_quantization(checkpoint, folders[label], label, recipe, inputs)
        for label, (recipe, inputs, _) in targets.items()
    ]


def _settings(plan: QuantizePlan, memory: int) -> WorkSettings:
    calibration = plan.inputs.calibration
    budget = MemoryBudget(memory, calibration_bytes(calibration))
    budget.check(plan.matrices)
    return WorkSettings(budget, calibration, plan.recipe.smoothing)


def _check_room(plans: Sequence[QuantizePlan], found: Sequence[Manifest]) -> None:
    needed: dict[int, int] = {}
    for plan, done in zip(plans, found, strict=True):
        if isinstance(plan.target, Path):
            device = _device(plan.target)
            needed[device] = needed.get(device, 0) + max(0, plan.target_bytes - room_there(plan.target, done))
            check_space(plan.target, needed[device])


def _device(path: Path) -> int:
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists()).stat().st_dev


def _bars(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    # The rate over five minutes: files end in bursts.
    return Progress(*columns, *times, console=Console(stderr=True), disable=not shown, speed_estimate_period=300)


@contextlib.contextmanager
def _ray(cluster: _Cluster) -> Iterator[int]:
    """The caller's Ray, or another; yields its number of CPUs."""
    with contextlib.ExitStack() as stack:
        # A local Ray must be begun before ray is imported, so ray is imported inside functions here.
        loaded = sys.modules.get("ray")
        if loaded is None or not loaded.is_initialized():
            cpus = cluster.workers or os.cpu_count() or 1
            stack.enter_context(job_ray(cpus, cluster.address, cluster.keep_logs))
        import ray

        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < 1:
            raise QuantizeError("the Ray cluster has no CPU to run a task on")
        yield cpus
