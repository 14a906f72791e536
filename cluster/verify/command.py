"""`flyray verify A [B]`: checks one checkpoint by itself, or two of one model against each other and limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ...actors.checkpoint import Checkpoint, CheckpointError
from ...actors.engine_error import EngineError
from ...actors.model.config import ModelConfig
from ..engine_session import engine_session
from ..evaluate.columns import Column, ColumnScore, Material
from ..evaluate.command import measure_columns, read_material
from ..evaluate.selection import tensor_bytes
from ..evaluate.settings import WORK_DIR, EvalSettings
from ..evaluate.table import figures
from ..figures import Figure
from ..job import job_ray, run_stoppable
from .check import Check, Verification
from .limits import Limits, limits_need, score_checks, weight_checks
from .structure import (
    finite_check,
    open_target,
    same_model,
    same_tokenizer,
    sums_check,
    tensors_check,
    tokenizer_check,
)
from .target import Target, VerifyError, parse_target
from .weights import WeightReport, compare_weights, relative_error

BEYOND = 1
STOPPED = 130


@dataclass(frozen=True)
class Sound:
    """A target whose files are as they should be."""

    target: Target
    checkpoint: Checkpoint
    model: ModelConfig


def run(
    a: str,
    b: str | None = None,
    *,
    limits: Limits | None = None,
    text_file: str | Path,
    tasks_file: str | Path,
    settings: EvalSettings | None = None,
    engine: bool = True,
    work_dir: str | Path = WORK_DIR,
    json_path: str | Path | None = None,
    console: Console | None = None,
    keep_logs: bool = False,
) -> int:
    """The command: prints a line for each check, writes checks and figures to json_path.

    a, b: FOLDER or FOLDER:PRECISION. engine: also run what is verified; without it nothing is loaded. Raises
    VerifyError, TextError, TaskError and EvalError for a call that makes no sense. Returns the exit code: 0 if no check
    failed, 1 if one did, 130 after a signal.
    """
    settings, limits, console = settings or EvalSettings(), limits or Limits(), console or Console()
    targets = [parse_target("A", a), *([parse_target("B", b)] if b is not None else [])]
    _check_limits(limits, targets, engine, settings)
    material = read_material(Path(text_file), Path(tasks_file), settings) if engine and b is not None else None
    verifier = Verifier(targets, limits, settings, material, Path(work_dir), console, keep_logs)
    try:
        verification = verifier.run(engine)
    except KeyboardInterrupt:
        console.print("stopped")
        return STOPPED
    failed = sum(check.passed is False for check in verification.checks)
    console.print(f"{failed} of {len(verification.checks)} checks failed" if failed else "all checks passed")
    if json_path is not None:
        verification.write(Path(json_path))
    return 0 if verification.passed else BEYOND


def _check_limits(limits: Limits, targets: Sequence[Target], engine: bool, settings: EvalSettings) -> None:
    """Refuses a limit that nothing will be held against: it would pass unseen."""
    given = [name for name, value in vars(limits).items() if value is not None]
    if len(targets) == 1 and given:
        option = "--" + given[0].replace("_", "-")
        raise VerifyError(f"{option}: a limit compares two checkpoints; name the second one")
    if not engine and limits_need(limits):
        raise VerifyError(f"{limits_need(limits)[0]}: needs the engine; leave out --no-engine")
    if limits.min_task_share is not None and not settings.tasks:
        raise VerifyError("--min-task-share: there are no tasks with --tasks 0")
    if not settings.text_bytes and any(name != "--min-task-share" for name in limits_need(limits)):
        raise VerifyError(f"{limits_need(limits)[0]}: there is no text with --text-bytes 0")


class Verifier:
    """Makes the checks one after another and prints each at once; what a failure makes impossible is left out."""

    def __init__(
        self,
        targets: Sequence[Target],
        limits: Limits,
        settings: EvalSettings,
        material: Material | None,
        work_dir: Path,
        console: Console,
        keep_logs: bool,
    ) -> None:
        self._targets, self._limits, self._settings = targets, limits, settings
        self._material, self._work_dir, self._console, self._keep_logs = material, work_dir, console, keep_logs
        self._checks: list[Check] = []
        self._figures: list[Figure] = []

    def run(self, engine: bool) -> Verification:
        """All checks. Raises VerifyError and Stopped."""
        sound = [each for target in self._targets if (each := self._files(target))]
        if len(sound) == len(self._targets) and self._comparable(sound):
            if len(sound) == 2:
                self._weights(sound[0], sound[1])
            if engine:
                self._engine(sound)
        return Verification(tuple(self._checks), tuple(self._figures))

    def _add(self, *checks: Check) -> bool:
        for check in checks:
            style = {"ok": "green", "FAIL": "bold red", "-": "dim"}[check.verdict]
            line = check.line()
            marked = f"[{style}]{line[:4]}[/]{escape(line[4:])}"
            self._console.print(marked, highlight=False, soft_wrap=True)
        self._checks += checks
        return all(check.passed is not False for check in checks)

    def _files(self, target: Target) -> Sound | None:
        """What can be said of one checkpoint without running it; None if it cannot be loaded."""
        self._console.print(f"{target.name} is {target}", highlight=False, soft_wrap=True, markup=False)
        self._add(sums_check(target))
        checkpoint, check = open_target(target)
        if not self._add(check) or checkpoint is None:
            return None
        model, check = tensors_check(target)
        if not self._add(check) or model is None:
            return None
        usable = self._add(tokenizer_check(target, model))
        with self._progress(f"reading {target.name}") as progress:
            check = finite_check(target, checkpoint, progress.report)
        usable = self._add(check) and usable
        return Sound(target, checkpoint, model) if usable else None

    def _comparable(self, sound: Sequence[Sound]) -> bool:
        if len(sound) == 1:
            return True
        a, b = sound
        return self._add(same_model(a.model, b.model)) & self._add(same_tokenizer(a.target.path, b.target.path))

    def _weights(self, a: Sound, b: Sound) -> None:
        try:
            with self._progress("comparing") as progress:
                report = compare_weights(a.checkpoint, b.checkpoint, progress.report)
        except CheckpointError as error:
            self._add(Check("tensors of both", str(error), False))
            return
        self._add(*weight_checks(report, self._limits))
        self._figures += weight_figures(report)

    def _engine(self, sound: Sequence[Sound]) -> None:
        """Loads and runs: the golden prompt alone for one checkpoint, text and tasks for two."""
        try:
            with job_ray(self._settings.cpus, keep_logs=self._keep_logs) as end_now:
                if self._material is None:
                    run_stoppable(partial(self._start, sound[0].target), end_now)
                else:
                    self._scores(self._measure(sound, self._material, end_now))
        except EngineError as error:
            self._add(Check("engine", str(error), False))

    async def _start(self, target: Target) -> None:
        config = self._settings.engine(target.path, target.precision)
        async with engine_session(config, target.name):
            self._add(Check("engine", f"{target.name} loads, its kernels and the golden prompt are right", True))

    def _measure(self, sound: Sequence[Sound], material: Material, end_now: Callable[[], None]) -> list[ColumnScore]:
        columns = [
            Column(each.target.name, each.target.path, each.target.precision, "A", tensor_bytes(each.checkpoint))
            for each in sound
        ]
        return measure_columns(columns, material, self._settings, self._work_dir, self._console, end_now)

    def _scores(self, scores: Sequence[ColumnScore]) -> None:
        a, b = scores
        self._add(Check("engine", "A and B load, their kernels and the golden prompt are right", True))
        self._add(*score_checks(a, b, self._limits))
        self._figures += figures(scores)

    def _progress(self, what: str) -> ReadingProgress:
        return ReadingProgress(self._console, what)


class ReadingProgress:
    """One line that names the tensor being read."""

    def __init__(self, console: Console, what: str) -> None:
        shape = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*shape, console=console, transient=True, disable=not console.is_terminal)
        self._what = what
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> ReadingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, name: str) -> None:
        """The tensor or expert that is read now."""
        self._progress.update(self._task, description=f"{self._what}: {escape(name)}")


def weight_figures(report: WeightReport) -> list[Figure]:
    """weight_error (over all), weight_error.worst, row_error.worst, and weight_error.KIND of every projection."""
    distances = [*report.experts, *report.linears]
    found = [
        Figure("tensors.identical", len(report.identical), "tensors"),
        Figure("tensors.differing", len(report.differing), "tensors"),
    ]
    if distances:
        found.append(Figure("weight_error", relative_error(distances), "1"))
        found.append(Figure("weight_error.worst", max(each.error for each in distances), "1"))
        found.append(Figure("row_error.worst", max(each.row_error for each in distances), "1"))
    for kind in sorted({each.kind for each in distances}):
        error = relative_error([each for each in distances if each.kind == kind])
        found.append(Figure(f"weight_error.{kind}", error, "1"))
    return found
