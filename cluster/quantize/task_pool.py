"""Runs the files of several plans as Ray tasks, a bounded number at a time, and turns what they send into reports."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ...actors.checkpoint import INDEX, CheckpointError
from .file_task import ChunkDone, MatrixError, quantize_files
from .matrix import QuantizeError
from .metadata import copied_files, write_metadata
from .plan import FilePlan, QuantizePlan
from .quark_quantizer import SCHEMES
from .report import QuantizeReport, per_kind, relative_error, worst
from .safetensors_writer import temporary_path

_STOP_SECONDS = 10
_BATCH_BYTES = 256 << 20


@dataclass
class _Run:
    """What has been heard of one plan so far."""

    plan: QuantizePlan
    bar: TaskID
    files_left: int
    errors: list[MatrixError] = field(default_factory=list)
    quark_config: dict[str, Any] | None = None
    started: float = float("inf")
    ended: float = 0.0
    import_seconds: float = 0.0
    report: QuantizeReport | None = None

    def take(self, done: ChunkDone) -> None:
        self.errors.extend(done.errors)
        self.quark_config = done.quark_config or self.quark_config
        self.started = min(self.started, done.started)
        self.ended = max(self.ended, done.ended)
        self.import_seconds = max(self.import_seconds, done.import_seconds)
        self.files_left -= done.complete
        if self.files_left == 0:
            self.finish()

    def finish(self) -> None:
        write_metadata(self.plan, self.quark_config)
        self.report = QuantizeReport(
            format=self.plan.format,
            source_format=self.plan.source_format,
            target=self.plan.target,
            bytes_before=self.plan.source_bytes,
            bytes_after=self.plan.target_bytes,
            seconds=self.ended - self.started,
            import_seconds=self.import_seconds,
            weight_error=relative_error(self.errors),
            per_kind=per_kind(self.errors),
            worst=worst(self.errors),
        )


def run_plans(plans: list[QuantizePlan], workers: int, progress: bool) -> list[QuantizeReport]:
    """Runs every file of every plan, `workers` tasks at a time, and returns the plans' reports in their order.

    On any error, Ctrl-C included, tasks are cancelled and what unfinished plans wrote is deleted."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not progress) as bars:
        runs = [_Run(plan, _bar(bars, plan), len(plan.files)) for plan in plans]
        by_target = {file.target: run for run in runs for file in run.plan.files}
        work = deque(_batches(plans))
        flying: dict[Any, list[FilePlan]] = {}
        try:
            for plan in plans:
                _prepare(plan)
            while work or flying:
                while work and len(flying) < workers:
                    files = work.popleft()
                    flying[_start(files)] = files
                if (done := _receive(flying)) is not None:
                    run = by_target[done.target]
                    run.take(done)
                    bars.update(run.bar, advance=done.source_bytes, description=run.plan.format)
        except BaseException:
            _stop(flying)
            for run in runs:
                if run.report is None:
                    _discard(run.plan)
            raise
    return [run.report for run in runs if run.report is not None]


def _bar(bars: Progress, plan: QuantizePlan) -> TaskID:
    # Importing Quark takes up to a minute on a busy machine; the first message replaces this.
    waiting = " (loading AMD Quark)" if plan.format in SCHEMES else ""
    return bars.add_task(plan.format + waiting, total=plan.source_bytes)


def _prepare(plan: QuantizePlan) -> None:
    """Makes the target folder, and removes from it what an old checkpoint consists of: config.json first, so that what
    remains after an interruption does not open. Other files stay."""
    plan.target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", INDEX):
        (plan.target / name).unlink(missing_ok=True)
    for file in plan.target.glob("*.safetensors"):
        file.unlink()


def _batches(plans: list[QuantizePlan]) -> Iterator[list[FilePlan]]:
    """The files of each task. Small files share one, so that a small model's formats share one import of Quark; those
    that need Quark come first, because they take longest."""
    for needs_quark in (True, False):
        batch: list[FilePlan] = []
        for file in (f for plan in plans if (plan.format in SCHEMES) == needs_quark for f in plan.files):
            if batch and sum(f.source_bytes for f in batch) + file.source_bytes > _BATCH_BYTES:
                yield batch
                batch = []
            batch.append(file)
        if batch:
            yield batch


def _start(files: list[FilePlan]) -> Any:
    # A worker that dies (memory, a lost node) is replaced: a task writes its files from the start, so it may run again.
    task = ray.remote(num_cpus=1, max_retries=2, num_returns="streaming")(quantize_files)
    return task.remote(files)


def _receive(flying: dict[Any, list[FilePlan]]) -> ChunkDone | None:
    """Waits for one message of any task; None when it was a task's end."""
    ready: list[Any] = ray.wait(list(flying), num_returns=1)[0]
    (stream,) = ready
    try:
        done: Any = ray.get(next(stream))
        return done
    except StopIteration:
        del flying[stream]
        return None
    except RayError as error:
        # It has ended by itself: cancelling it now would kill the worker, with the Quark that it has imported.
        raise _cause(error, flying.pop(stream)) from error


def _cause(error: RayError, files: list[FilePlan]) -> Exception:
    cause = error.cause if isinstance(error, RayTaskError) else error
    where = ", ".join(str(file.target) for file in files)
    if isinstance(cause, QuantizeError | CheckpointError):
        return type(cause)(str(cause))
    if isinstance(cause, OSError):
        return QuantizeError(f"{where}: {cause.strerror or cause}")
    return QuantizeError(f"{where}: {type(cause).__name__}: {cause}")


def _stop(flying: dict[Any, list[FilePlan]]) -> None:
    """Ends running tasks, so that none writes after the clean-up."""
    streams = list(flying)
    with contextlib.suppress(RayError):
        for stream in streams:
            ray.cancel(stream, force=True)
        ray.wait([stream.completed() for stream in streams], num_returns=len(streams), timeout=_STOP_SECONDS)


def _discard(plan: QuantizePlan) -> None:
    """Deletes what a plan may have written; the folder too if it is then empty."""
    names = [file.target for file in plan.files]
    names += [plan.target / file.name for file in copied_files(plan.source)]
    names += [plan.target / INDEX, plan.target / "config.json"]
    for path in names:
        temporary_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        plan.target.rmdir()
