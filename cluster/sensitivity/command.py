"""`flyray sensitivity CHECKPOINT OUT.json`: what each group of experts loses at the low format, and mixed choices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich import progress as bars
from rich.console import Console

from ...actors.checkpoint import Checkpoint
from ...actors.engine_config import EngineConfig
from ...actors.engine_shape import EngineShape
from ...actors.statistics import Statistics, fingerprint
from ..code_version import code_version
from ..evaluate import perplexity
from ..evaluate.distributions import distributions_folder, needed_bytes
from ..evaluate.perplexity import TextScore, Window, cut_windows
from ..evaluate.quantized_cache import QuantizedCache
from ..figures import write_figures
from ..job import job_ray, nothing, run_stoppable
from ..quantize.fingerprint import source_fingerprint
from ..quantize.matrix import TARGET_FORMATS
from ..tokenizer import Tokenizer
from .measure import Measuring, Progress, measure
from .sensitivity import Base, Sensitivity, SensitivityError
from .table import figures, print_sensitivity
from .units import plan_units

STOPPED = 130
# Everything that the measured numbers come from.
MEASURING_CODE = (
    "kernels",
    "actors",
    "cluster.evaluate.distributions",
    "cluster.evaluate.intervals",
    "cluster.evaluate.perplexity",
    "cluster.quantize.mixed",
    "cluster.sensitivity.measure",
)


@dataclass(frozen=True)
class SensitivitySettings:
    """What is measured. low, high: formats (quantized into the work folder if they are not there), or folders.

    groups: of each layer's experts; by use if `calibration` (a statistics folder) is given, else by number. shares: of
    the way from all low to all high, measured as whole choices at the end.
    """

    low: str = "w4a8-channel"
    high: str = "w8a8"
    groups: int = 4
    calibration: Path | None = None
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    text_bytes: int = 100_000
    window: int = 1024
    shards: int = 1
    threads: int = 1
    concurrency: int = 16

    def __post_init__(self) -> None:
        """Raises SensitivityError naming the field."""
        if self.groups < 1:
            raise SensitivityError(f"groups: {self.groups}; at least 1 is needed")
        for share in self.shares:
            if not 0 <= share <= 1:
                raise SensitivityError(f"shares: {share:g} does not lie between 0 (all low) and 1 (all high)")

    @property
    def cpus(self) -> int:
        return self.shards * self.threads

    def engine(self, path: Path) -> EngineConfig:
        """The engines' settings, with a KV cache for `concurrency` sequences."""
        return EngineConfig(
            model_path=str(path),
            shards=self.shards,
            threads_per_shard=self.threads,
            max_sequences=self.concurrency,
        )


def run(
    source: str | Path,
    target: str | Path,
    *,
    text_file: str | Path,
    settings: SensitivitySettings | None = None,
    work_dir: str | Path,
    overwrite: bool = False,
    json_path: str | Path | None = None,
    console: Console | None = None,
    keep_logs: bool = False,
) -> int:
    """The command, in a local Ray of its own: measures, prints the losses, writes figures to json_path.

    Raises what `measure_sensitivity` raises. Returns the exit code: 0, or 130 after a signal; the same command then
    goes on where it stopped.
    """
    settings = settings or SensitivitySettings()
    console = console or Console()
    try:
        with job_ray(settings.cpus, keep_logs=keep_logs) as end_now:
            found = measure_sensitivity(
                Path(source),
                Path(target),
                Path(text_file),
                settings,
                work_dir=Path(work_dir),
                overwrite=overwrite,
                console=console,
                end_now=end_now,
            )
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on with what is in {target}")
        return STOPPED
    print_sensitivity(found, console)
    if json_path is not None:
        write_figures(json_path, figures(found))
    return 0


def measure_sensitivity(
    source: Path,
    target: Path,
    text_file: Path,
    settings: SensitivitySettings,
    *,
    work_dir: Path,
    overwrite: bool = False,
    console: Console | None = None,
    end_now: Callable[[], None] = nothing,
) -> Sensitivity:
    """Measures in the Ray that is initialized, and keeps the file `target` up to date after every unit.

    A target of the same key (source, formats, text, code) is gone on with, or returned if it is complete; another one
    is a SensitivityError unless `overwrite`. work_dir keeps quantized checkpoints, and for the while the source's
    distributions. Raises SensitivityError, TextError, SpaceError, StatisticsError, CheckpointError, QuantizeError, what
    starting an engine raises, and Stopped when a signal came.
    """
    checkpoint = Checkpoint(source)
    windows = _windows(source, text_file, settings)
    statistics = None
    if settings.calibration is not None:
        statistics = Statistics.open(settings.calibration)
        statistics.check(checkpoint)
    experts = EngineShape.read(settings.engine(source)).model.n_routed_experts
    if settings.groups > experts:
        raise SensitivityError(f"groups: {settings.groups} groups of the {experts} experts of a layer")
    if target.exists() and not overwrite:
        Sensitivity.read(target)  # to refuse anything else before hours of quantizing
    low_path, high_path = _checkpoints(source, settings, work_dir)
    low, high = Checkpoint(low_path), Checkpoint(high_path)
    units = plan_units(low, high, settings.groups, statistics)
    measuring = Measuring(
        settings.engine(source), source, low_path, high_path, windows, units, settings.shares, settings.concurrency
    )
    key = _key(measuring)
    kept = None if overwrite else _kept(target, key)
    if kept is not None and kept.complete:
        return kept

    def blank(base: Base, score: TextScore) -> Sensitivity:
        return Sensitivity(
            fingerprint=fingerprint(checkpoint),
            key=key,
            low=low.expert_format(),
            high=high.expert_format(),
            groups=settings.groups,
            grouping="number" if statistics is None else "use",
            tokens=sum(score.tokens),
            documents=len(score.tokens),
            base=base,
            units=(),
            complete=False,
        )

    def save(found: Sensitivity) -> None:
        found.write(target)

    done = len(kept.units) + len(kept.checks) if kept is not None else 0
    tokens = [window.tokens for window in windows]
    vocabulary = EngineShape.read(measuring.engine).model.vocab_size
    with (
        distributions_folder(work_dir, needed_bytes(tokens, vocabulary)) as folder,
        SensitivityProgress(console or Console(quiet=True), measuring, done) as progress,
    ):
        found = run_stoppable(partial(measure, measuring, folder, blank, kept, save, progress), end_now)
    found.write(target)
    return found


def _windows(source: Path, text_file: Path, settings: SensitivitySettings) -> list[Window]:
    documents = perplexity.choose(perplexity.read_documents(text_file), settings.text_bytes)
    if len(documents) < 2:
        raise SensitivityError(f"{text_file} holds {len(documents)} documents; two are needed for an interval")
    config = settings.engine(source)
    length = min(settings.window, EngineShape.read(config).longest_sequence(config))
    return cut_windows(Tokenizer(source), documents, length)


def _checkpoints(source: Path, settings: SensitivitySettings, work_dir: Path) -> tuple[Path, Path]:
    """Folders of the low and the high checkpoint; formats are taken from, or made in, work_dir."""
    names = {"low": settings.low, "high": settings.high}
    formats = [name for name in names.values() if name in TARGET_FORMATS]
    for option, name in names.items():
        if name not in formats and not Path(name).is_dir():
            raise SensitivityError(
                f"{option}: {name!r} is neither a folder nor one of the formats {', '.join(TARGET_FORMATS)}"
            )
    made = QuantizedCache(work_dir, source).ensure(formats) if formats else {}
    low, high = (made[name].path if name in formats else Path(name) for name in names.values())
    return low, high


def _key(run: Measuring) -> str:
    """Of everything that the numbers depend on."""
    checkpoints = [source_fingerprint(Checkpoint(path)) for path in (run.source, run.low, run.high)]
    units = [(unit.layer, unit.experts) for unit in run.units]
    windows = [window.tokens for window in run.windows]
    parts = [code_version(*MEASURING_CODE), checkpoints, units, windows, run.shares]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _kept(target: Path, key: str) -> Sensitivity | None:
    """What a run of this key has written there. Raises SensitivityError for anything else that is there."""
    if not target.exists():
        return None
    kept = Sensitivity.read(target)
    if kept.key != key:
        raise SensitivityError(
            f"{target}: was measured of another checkpoint, other formats, groups or text, or by another version of "
            "flyray; name another file, or pass --overwrite"
        )
    return kept


class SensitivityProgress(Progress):
    """A bar over all windows of all runs, with the time left."""

    def __init__(self, console: Console, run: Measuring, done: int) -> None:
        shape = (
            bars.TextColumn("{task.description:<34}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bars = bars.Progress(*shape, console=console, transient=True, speed_estimate_period=600)
        self._task = self._bars.add_task("starting", total=(run.runs - done) * len(run.windows))

    def __enter__(self) -> SensitivityProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def scoring(self, what: str) -> None:
        """Shows it beside the bar."""
        self._bars.update(self._task, description=what)

    def window(self) -> None:
        """Advances the bar."""
        self._bars.advance(self._task)
