"""Runs the files of several plans as Ray tasks, a bounded number at a time, and turns what they send into records."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from ...actors.checkpoint import CheckpointError
from .file_task import FileProgress, WorkSettings, quantize_files
from .matrix import QuantizeError
from .plan import FilePlan
from .quantize_run import QuantizeRun

_STOP_SECONDS = 10
_BATCH_BYTES = 256 << 20
_ATTEMPTS = 3
# What says that a worker or a node is gone, and nothing about the work.
_DEATHS = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)


def run_files(runs: list[QuantizeRun], settings: Mapping[str, WorkSettings], workers: int) -> None:
    """Makes every file that the runs still need, `workers` tasks at a time; settings: by label.

    On an error, Ctrl-C included, tasks are cancelled. Files that are finished then stay."""
    pool = _Pool(runs, settings)
    try:
        pool.run(workers)
    except BaseException:
        pool.stop()
        raise


class _Pool:
    def __init__(self, runs: list[QuantizeRun], settings: Mapping[str, WorkSettings]) -> None:
        self._settings = settings
        self._by_path = {str(file.path): run for run in runs for file in run.plan.files}
        self._work = deque(_batches(runs))
        self._flying: dict[Any, list[FilePlan]] = {}
        self._deaths: dict[str, int] = {}

    def run(self, workers: int) -> None:
        while self._work or self._flying:
            while self._work and len(self._flying) < workers:
                files = self._work.popleft()
                self._flying[self._start(files)] = files
            if (progress := self._receive()) is not None:
                self._by_path[progress.path].take(progress)

    def stop(self) -> None:
        """Ends running tasks, so that none writes after the end."""
        streams = list(self._flying)
        with contextlib.suppress(RayError):
            for stream in streams:
                ray.cancel(stream, force=True)
            ray.wait([stream.completed() for stream in streams], num_returns=len(streams), timeout=_STOP_SECONDS)

    def _start(self, files: list[FilePlan]) -> Any:
        # Spread over the nodes, each of which has a disk or a network card of its own. A worker that dies is replaced
        # here and not by Ray, which would go on in the middle of what a task sends.
        options = {"num_cpus": 1, "max_retries": 0, "num_returns": "streaming", "scheduling_strategy": "SPREAD"}
        task = ray.remote(**options)(quantize_files)
        label = self._by_path[str(files[0].path)].plan.label
        return task.remote(files, self._settings[label])

    def _receive(self) -> FileProgress | None:
        """Waits for one message of any task; None when it was a task's end."""
        ready: list[Any] = ray.wait(list(self._flying), num_returns=1)[0]
        (stream,) = ready
        try:
            progress: Any = ray.get(next(stream))
            return progress
        except StopIteration:
            del self._flying[stream]
            return None
        except _DEATHS as error:
            self._again(self._flying.pop(stream), error)
            return None
        except RayError as error:
            # It has ended by itself: cancelling it now would kill the worker, with the Quark that it has imported.
            raise _cause(error, self._flying.pop(stream)) from error

    def _again(self, files: list[FilePlan], error: RayError) -> None:
        """What a dead worker left unfinished; the first of it is what it died at."""
        left = [file for file in files if not self._by_path[str(file.path)].has(file.name)]
        if not left:
            return
        path = str(left[0].path)
        self._deaths[path] = self._deaths.get(path, 0) + 1
        if self._deaths[path] == _ATTEMPTS:
            raise _cause(error, left[:1]) from error
        self._work.appendleft(left)


def _batches(runs: list[QuantizeRun]) -> Iterator[list[FilePlan]]:
    """The files of each task. Small files share one, so that a small model's formats share one import of Quark; those
    that need Quark come first, because they take longest."""
    for by_quark in (True, False):
        for run in runs:
            batch: list[FilePlan] = []
            for file in (file for file in run.missing() if file.by_quark == by_quark):
                if batch and sum(f.source_bytes for f in batch) + file.source_bytes > _BATCH_BYTES:
                    yield batch
                    batch = []
                batch.append(file)
            if batch:
                yield batch


def _cause(error: RayError, files: list[FilePlan]) -> Exception:
    cause = error.cause if isinstance(error, RayTaskError) else error
    where = ", ".join(str(file.path) for file in files)
    if isinstance(cause, QuantizeError | CheckpointError):
        return type(cause)(str(cause))
    if isinstance(cause, OSError):
        return QuantizeError(f"{where}: {cause.strerror or cause}")
    return QuantizeError(f"{where}: {type(cause).__name__}: {cause}")
