"""`flyray calibrate CHECKPOINT OUT`: runs text through the engine and keeps what its experts saw."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ...actors.engine_config import EngineConfig
from ...actors.engine_shape import EngineShape
from ...actors.request import Generate
from ...actors.statistics import Statistics
from ...actors.step_plan import Sampling
from ..crew import work_through
from ..engine_session import EngineSession, engine_session
from ..figures import write_figures
from ..job import job_ray, nothing, run_stoppable
from ..tokenizer import Tokenizer
from .material import Window, read_windows
from .report import CalibrationReport, figures, show

STOPPED = 130
_GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)
OnTokens = Callable[[int], None]


class CalibrationSettingsError(ValueError):
    """Settings that do not fit the model; the message names the one."""


class CalibrationError(RuntimeError):
    """The engine did not run a window of text; the message is the engine's."""


@dataclass(frozen=True)
class CalibrationSettings:
    """text: a file as of `flyray eval`. tokens: to run, in all; 0 for all of the text. window: tokens of one request,
    at most what the context holds. moments_block: columns of the diagonal blocks of second moments, 0 for none.
    precision: that the model runs in; "auto" as it is on disk. concurrency: windows that run at once."""

    text: Path
    tokens: int = 0
    window: int = 1024
    moments_block: int = 0
    precision: str = "auto"
    shards: int = 1
    threads: int = 1
    concurrency: int = 16

    def engine(self, checkpoint: Path, target: Path) -> EngineConfig:
        """The engine's settings. Raises ValueError."""
        return EngineConfig(
            model_path=str(checkpoint),
            name="calibrate",
            precision=self.precision,
            shards=self.shards,
            threads_per_shard=self.threads,
            max_sequences=self.concurrency,
            statistics=str(target.resolve()),
            moments_block=self.moments_block,
        )


def run(
    checkpoint: str | Path,
    target: str | Path,
    settings: CalibrationSettings,
    *,
    json_path: str | Path | None = None,
    console: Console | None = None,
    keep_logs: bool = False,
) -> int:
    """The command: calibrates in a local Ray of its own, prints the report, writes its figures to json_path.

    Raises what `calibrate` raises, and CalibrationSettingsError before anything starts. Returns the exit code: 0, or
    130 after a signal.
    """
    console = console or Console()
    _check(settings, Path(checkpoint), Path(target))
    columns = (TextColumn("calibrating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    try:
        with (
            job_ray(settings.shards * settings.threads, keep_logs=keep_logs) as end_now,
            Progress(*columns, console=console, transient=True) as bars,
        ):
            bar = bars.add_task("tokens", total=None)
            report = calibrate(
                Path(checkpoint),
                Path(target),
                settings,
                on_start=lambda tokens: bars.update(bar, total=tokens),
                on_tokens=lambda tokens: bars.advance(bar, tokens),
                end_now=end_now,
            )
    except KeyboardInterrupt:
        console.print(f"stopped; the statistics in {target} are incomplete, the same command begins anew")
        return STOPPED
    show(report, console)
    if json_path is not None:
        write_figures(json_path, figures(report))
    return 0


def _check(settings: CalibrationSettings, checkpoint: Path, target: Path) -> None:
    try:
        EngineShape.read(settings.engine(checkpoint, target))
    except ValueError as error:
        if type(error) is ValueError:  # others have names of their own
            raise CalibrationSettingsError(str(error)) from error
        raise


def calibrate(
    checkpoint: Path,
    target: Path,
    settings: CalibrationSettings,
    *,
    on_start: OnTokens | None = None,
    on_tokens: OnTokens | None = None,
    end_now: Callable[[], None] = nothing,
) -> CalibrationReport:
    """Calibrates in the Ray that is initialized, from the main thread: statistics of `checkpoint` in folder `target`.

    on_start: called with how many tokens will run; on_tokens: with how many have run since the last call. end_now:
    ends all processes at a second signal. Raises TextError, StatisticsError, CalibrationError, ValueError for settings
    that do not fit the model, what starting an engine raises, and Stopped; what is in target is then incomplete, and a
    later call begins anew.
    """
    config = settings.engine(checkpoint, target)
    return run_stoppable(partial(_gather, config, settings, on_start, on_tokens), end_now)


async def _gather(
    config: EngineConfig, settings: CalibrationSettings, on_start: OnTokens | None, on_tokens: OnTokens | None
) -> CalibrationReport:
    read_windows(settings.text, Tokenizer(config.model_path), 1, 1)  # text that is none, before an engine starts
    async with engine_session(config, "calibrate", partial_statistics=False) as session:
        seconds = await _run_text(session, settings, on_start, on_tokens)
    target = Path(config.statistics)
    size = sum(file.stat().st_size for file in target.iterdir())
    return CalibrationReport(Statistics.open(target), seconds, size)


async def _run_text(
    session: EngineSession, settings: CalibrationSettings, on_start: OnTokens | None, on_tokens: OnTokens | None
) -> float:
    """Runs all windows; returns the seconds."""
    # One token is sampled after each window, and needs a place in the context.
    length = min(settings.window, session.context_length - 1)
    windows = read_windows(settings.text, session.tokenizer, length, settings.tokens)
    if on_start is not None:
        on_start(sum(map(len, windows)))

    async def run_window(window: Window) -> None:
        await _run_window(session, window)
        if on_tokens is not None:
            on_tokens(len(window))

    begin = time.monotonic()
    await work_through(windows, run_window, settings.concurrency)
    return time.monotonic() - begin


async def _run_window(session: EngineSession, window: Window) -> None:
    """Runs a prompt and samples one token, which is not run: cheaper than scoring, whose logits are for all rows."""
    request = Generate(
        request=f"calibrate-{uuid.uuid4().hex}",
        prompt=window,
        max_tokens=1,
        sampling=_GREEDY,
        stop_tokens=(),
        priority=1,
        score_prompt=False,
    )
    async for progress in session.client.generate(request):
        if progress.finish == "error":
            raise CalibrationError(progress.error)
