"""`flyray eval CHECKPOINT…`: perplexity and task scores of checkpoints in several formats, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...actors.checkpoint import Checkpoint
from ...actors.engine_config import EngineConfig
from ..figures import write_figures
from ..job import job_ray, run_stoppable
from ..stop_signals import Stopped
from ..tokenizer import Tokenizer
from . import perplexity, score
from .columns import Column, ColumnScore, Material, evaluate
from .perplexity import cut_windows
from .quantized_cache import QUANTIZED_FORMATS, KeptCheckpoint, QuantizedCache
from .table import figures, quality_table

NATIVE = "w4a16"
STOPPED = 130
FORMATS = ("bf16", "w4a16", *QUANTIZED_FORMATS)
WORK_DIR = Path.home() / ".cache" / "flyray"


class EvalError(ValueError):
    """What was asked for cannot be evaluated; the message says why and what can."""


@dataclass(frozen=True)
class EvalSettings:
    """What is measured and how. tasks: of each family, 0 for none. text_bytes: of text, 0 for none. window: tokens
    scored at once. lanes: engines that run at a time, each of `shards` shards with `threads` threads."""

    tasks: int = 20
    text_bytes: int = 200_000
    window: int = 1024
    max_tokens: int = 400
    shards: int = 1
    threads: int = 1
    lanes: int = 2
    concurrency: int = 16

    @property
    def cpus(self) -> int:
        return self.shards * self.threads * self.lanes

    def engine(self, path: Path) -> EngineConfig:
        """The engines' settings, with a KV cache for `concurrency` sequences."""
        return EngineConfig(
            model_path=str(path),
            shards=self.shards,
            threads_per_shard=self.threads,
            max_sequences=self.concurrency,
        )


def run(
    checkpoints: Sequence[str | Path],
    *,
    text_file: str | Path,
    tasks_file: str | Path,
    formats: Sequence[str] = (),
    settings: EvalSettings | None = None,
    work_dir: str | Path = WORK_DIR,
    json_path: str | Path | None = None,
    console: Console | None = None,
    keep_logs: bool = False,
) -> int:
    """The command: quantizes what is missing into work_dir, measures, prints the table, writes figures to json_path.

    formats: some of `FORMATS` or "all"; none: all that a checkpoint can be had in. Raises EvalError, TextError,
    TaskError, CheckpointError, QuantizeError, and what starting an engine raises. Returns the exit code: 0, or 130
    after a signal.
    """
    settings = settings or EvalSettings()
    console = console or Console()
    if not checkpoints:
        raise EvalError("name a checkpoint to evaluate")
    material = read_material(Path(text_file), Path(tasks_file), settings)
    try:
        scores = measure(list(map(Path, checkpoints)), formats, material, settings, Path(work_dir), console, keep_logs)
    except Stopped:
        console.print("stopped")
        return STOPPED
    console.print(quality_table(scores))
    if json_path is not None:
        write_figures(json_path, figures(scores))
    return 0


def measure(
    checkpoints: Sequence[Path],
    formats: Sequence[str],
    material: Material,
    settings: EvalSettings,
    work_dir: Path,
    console: Console,
    keep_logs: bool,
) -> list[ColumnScore]:
    """Quantizes what is missing and evaluates everything, in a local Ray of its own."""
    with job_ray(settings.cpus, keep_logs=keep_logs) as end_now:
        columns: list[Column] = []
        for path in checkpoints:
            label = f"{path.name}:" if len(checkpoints) > 1 else ""
            columns += columns_of(path, formats, work_dir, label)[0]
        check_labels(columns)
        return measure_columns(columns, material, settings, console, end_now)


def measure_columns(
    columns: Sequence[Column],
    material: Material,
    settings: EvalSettings,
    console: Console,
    end_now: Callable[[], None],
) -> list[ColumnScore]:
    """Evaluates columns in the Ray that is initialized, with a progress bar each."""
    with EvalProgress(console, columns, material) as progress:
        template = settings.engine(columns[0].path)
        main = partial(evaluate, columns, material, template, lanes=settings.lanes, report=progress.report)
        return run_stoppable(main, end_now)


def read_material(text_file: Path, tasks_file: Path, settings: EvalSettings) -> Material:
    """The text and tasks to measure with. Raises TextError, TaskError, or EvalError if nothing is left."""
    documents = perplexity.choose(perplexity.read_documents(text_file), settings.text_bytes)
    tasks = score.choose(score.read_tasks(tasks_file), settings.tasks) if settings.tasks else []
    if not documents and not tasks:
        raise EvalError("there is neither text nor a task to measure with")
    if len(documents) == 1:
        raise EvalError(f"{text_file} holds one document; two are needed for an interval")
    return Material(tuple(documents), tuple(tasks), settings.window, settings.max_tokens, settings.concurrency)


def columns_of(
    path: Path, formats: Sequence[str], work_dir: Path, label: str = ""
) -> tuple[list[Column], dict[str, KeptCheckpoint]]:
    """The columns of one checkpoint; formats that it must be quantized to are taken from, or made in, work_dir."""
    own = Checkpoint(path).expert_format()
    possible = FORMATS if own == NATIVE else (own, *QUANTIZED_FORMATS) if own == "bf16" else (own,)
    asked = possible if not formats or "all" in formats else tuple(dict.fromkeys(formats))
    for format in asked:
        if format not in FORMATS:
            raise EvalError(f"unknown format {format!r}; known are {', '.join(FORMATS)} and all")
        if format not in possible:
            raise EvalError(f"{path} is in {own} and cannot be had as {format}; take the one it came from")
    quantized = [format for format in asked if format in QUANTIZED_FORMATS and format != own]
    kept = QuantizedCache(work_dir, path).ensure(quantized) if quantized else {}
    columns = []
    for format in asked:
        if format in kept:
            columns.append(Column(label + format, kept[format].path, "auto"))
        else:
            columns.append(Column(label + format, path, "auto" if format == own else format))
    return columns, kept


def check_labels(columns: Sequence[Column]) -> None:
    """Raises EvalError when two columns would have one name."""
    labels = [column.label for column in columns]
    for label in labels:
        if labels.count(label) > 1:
            raise EvalError(f"two checkpoints would both be called {label.partition(':')[0]}; rename a folder")


class EvalProgress:
    """A bar for each column."""

    def __init__(self, console: Console, columns: Sequence[Column], material: Material) -> None:
        shape = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*shape, console=console, transient=True)
        windows = cut_windows(Tokenizer(columns[0].path), material.documents, material.window)
        total = len(windows) + len(material.tasks)
        self._tasks = {column.label: self._bars.add_task(column.label, total=total) for column in columns}

    def __enter__(self) -> EvalProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def report(self, label: str, count: int) -> None:
        """Counts finished windows and tasks of a column."""
        self._bars.advance(self._tasks[label], count)
