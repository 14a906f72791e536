"""`flyray eval CHECKPOINT…`: perplexity and task scores of checkpoints in several formats, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...actors.checkpoint import Checkpoint
from ...actors.engine_config import EngineConfig
from ...actors.model.config import ModelConfig
from ...kernels.select import check_kv_dtype
from ..figures import write_figures
from ..job import job_ray, run_stoppable
from . import perplexity, score
from .columns import Column, ColumnScore, Material, evaluate, windows_of
from .distributions import distributions_folder, needed_bytes
from .recipe_inputs import Calibrating
from .selection import EvalError, Selection, check_labels, select
from .settings import WORK_DIR, EvalSettings
from .table import figures, quality_tables

STOPPED = 130


def run(
    checkpoints: Sequence[str | Path],
    *,
    text_file: str | Path,
    tasks_file: str | Path,
    calibration_file: str | Path | None = None,
    formats: Sequence[str] = (),
    kv_dtypes: Sequence[str] = ("auto",),
    settings: EvalSettings | None = None,
    work_dir: str | Path = WORK_DIR,
    json_path: str | Path | None = None,
    console: Console | None = None,
    keep_logs: bool = False,
) -> int:
    """The command: quantizes what is missing into work_dir, measures, prints the tables, writes figures to json_path.

    formats: as `select` takes them. kv_dtypes: of KV pages; each column is measured with each.
    calibration_file: text for recipes that need a calibration or a sensitivity file. Raises EvalError,
    CalibrationTextError, SpaceError, TextError, TaskError, CheckpointError, QuantizeError, and what calibrating and
    starting an engine raise. Returns the exit code: 0, or 130 after a signal.
    """
    settings = settings or EvalSettings()
    console = console or Console()
    if not checkpoints:
        raise EvalError("name a checkpoint to evaluate")
    for kv_dtype in kv_dtypes:
        try:
            check_kv_dtype(EngineConfig.backend, kv_dtype)
        except ValueError as error:
            raise EvalError(str(error)) from None
    material = read_material(Path(text_file), Path(tasks_file), settings)
    calibration = None if calibration_file is None else Path(calibration_file)
    try:
        with job_ray(settings.cpus, keep_logs=keep_logs) as end_now:
            compared = bool(material.documents)
            evaluated = Path(text_file) if compared else None
            calibrating = Calibrating(calibration, evaluated, settings, console, end_now)
            selections = _selections(list(map(Path, checkpoints)), formats, Path(work_dir), calibrating, compared)
            chosen = [column for selection in selections for column in selection.columns]
            if compared and set(kv_dtypes) != {"auto"}:  # what stands alone is compared with itself
                chosen = [replace(column, reference=column.reference or column.label) for column in chosen]
            columns = [each for column in chosen for each in column.with_kv_dtypes(kv_dtypes)]
            check_labels(columns)
            scores = measure_columns(columns, material, settings, Path(work_dir), console, end_now)
    except KeyboardInterrupt:
        console.print("stopped")
        return STOPPED
    kept = [found for selection in selections for found in selection.kept.values()]
    for table in quality_tables(scores, {found.label: found.weight_error for found in kept}):
        console.print(table)
    if json_path is not None:
        write_figures(json_path, [*figures(scores), *(figure for found in kept for figure in found.figures())])
    return 0


def _selections(
    paths: Sequence[Path], formats: Sequence[str], work_dir: Path, calibrating: Calibrating, compared: bool
) -> list[Selection]:
    prefixes = [f"{path.resolve().name}:" if len(paths) > 1 else "" for path in paths]
    return [
        select(path, formats, work_dir, calibrating, prefix=prefix, compared=compared)
        for path, prefix in zip(paths, prefixes, strict=True)
    ]


def measure_columns(
    columns: Sequence[Column],
    material: Material,
    settings: EvalSettings,
    work_dir: Path,
    console: Console,
    end_now: Callable[[], None],
) -> list[ColumnScore]:
    """Evaluates columns in the Ray that is initialized, with a progress bar each. References keep their distributions
    in work_dir for the while. Raises SpaceError if they do not fit, and what `evaluate` raises."""
    references = [column for column in columns if column.is_reference] if material.documents else []
    needed = sum(_distribution_bytes(column.path, material) for column in references)
    if needed:
        labels = ", ".join(column.label for column in references)
        console.print(
            f"{needed / 1e6:,.1f} MB in {work_dir} for the while: what {labels} predicts, to compare the others with",
            style="dim",
            soft_wrap=True,
            highlight=False,
        )
    with distributions_folder(work_dir, needed) as folder, EvalProgress(console, columns, material) as progress:
        template = settings.engine(columns[0].path)
        main = partial(
            evaluate, columns, material, template, folder=folder, lanes=settings.lanes, report=progress.report
        )
        return run_stoppable(main, end_now)


def _distribution_bytes(path: Path, material: Material) -> int:
    vocabulary = ModelConfig.from_dict(Checkpoint(path).config).vocab_size
    return needed_bytes([window.tokens for window in windows_of(path, material)], vocabulary)


def read_material(text_file: Path, tasks_file: Path, settings: EvalSettings) -> Material:
    """The text and tasks to measure with. Raises TextError, TaskError, or EvalError if nothing is left."""
    documents = perplexity.choose(perplexity.read_documents(text_file), settings.text_bytes)
    tasks = score.choose(score.read_tasks(tasks_file), settings.tasks) if settings.tasks else []
    if not documents and not tasks:
        raise EvalError("there is neither text nor a task to measure with")
    if len(documents) == 1:
        raise EvalError(f"{text_file} holds one document; two are needed for an interval")
    return Material(tuple(documents), tuple(tasks), settings.window, settings.max_tokens, settings.concurrency)


class EvalProgress:
    """A bar for each column."""

    def __init__(self, console: Console, columns: Sequence[Column], material: Material) -> None:
        shape = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*shape, console=console, transient=True)
        total = len(windows_of(columns[0].path, material)) + len(material.tasks)
        self._tasks = {column.label: self._bars.add_task(column.label, total=total) for column in columns}

    def __enter__(self) -> EvalProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def report(self, label: str, count: int) -> None:
        """Counts finished windows and tasks of a column."""
        self._bars.advance(self._tasks[label], count)
