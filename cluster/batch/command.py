"""`flyray batch IN.jsonl OUT.jsonl`: a batch job on a server, or on an engine of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..figures import Figure, write_figures
from ..job import run_on_ray, run_stoppable
from .http import HttpRunner
from .job import BatchJob, BatchSummary, LineRunner, ServiceLost

if TYPE_CHECKING:
    from ..config import FlyrayConfig

JobMaker = Callable[[LineRunner], BatchJob]

CONCURRENCY = 32
STOPPED = 130
LOST = 1


def run(
    input_path: str | Path,
    output_path: str | Path,
    *,
    url: str | None = None,
    api_key: str = "",
    config: FlyrayConfig | None = None,
    concurrency: int = CONCURRENCY,
    retry_errors: bool = False,
    json_path: str | Path | None = None,
    console: Console | None = None,
    keep_logs: bool = False,
) -> int:
    """Runs the job on the server at `url`, or starts the engine of `config` for it; shows progress, prints counts.

    Returns the exit code: 0 when every line has a result, also if some are errors; 1 when the engine or the server was
    lost, 130 when a signal stopped it. In both cases the output holds all that was finished, and the same command goes
    on from there. Raises BatchFileError, ValueError for what the caller gave, and what starting an engine raises.
    """
    if (url is None) == (config is None):
        raise ValueError("give either the address of a server or a configuration")
    console = console or Console()
    job_files = (Path(input_path), Path(output_path))
    with BatchProgress(console) as progress:

        def make_job(runner: LineRunner) -> BatchJob:
            job = BatchJob(
                runner, *job_files, concurrency=concurrency, retry_errors=retry_errors, on_progress=progress.show
            )
            progress.show(job.summary)
            return job

        try:
            if config is not None:
                main = partial(run_on_own_engine, config, make_job)
                summary = run_on_ray(main, cpus=_cpus(config), address=config.ray.address, keep_logs=keep_logs)
            else:
                assert url is not None
                summary = run_stoppable(partial(run_over_http, url, api_key, make_job))
            code = 0
        except (ServiceLost, KeyboardInterrupt) as end:
            summary = progress.summary
            code = LOST if isinstance(end, ServiceLost) else STOPPED
            console.print(f"[red]stopped[/]: {end or 'by a signal'}. Run the same command to go on.", highlight=False)
    console.print(describe(summary, job_files[1]), highlight=False)
    if json_path is not None:
        write_figures(json_path, figures(summary))
    return code


async def run_over_http(url: str, api_key: str, make_job: JobMaker) -> BatchSummary:
    """The job on a running server."""
    async with HttpRunner(url, api_key=api_key) as runner:
        return await make_job(runner).run()


async def run_on_own_engine(config: FlyrayConfig, make_job: JobMaker) -> BatchSummary:
    """The job on an engine that ends with it; Ray must be initialized."""
    from ..engine_session import engine_session
    from .service import ServiceRunner

    limit = config.serve.default_max_tokens
    async with engine_session(config.engine_config(), config.model_name, limit) as session:
        return await make_job(ServiceRunner(session.service, session.client)).run()


def _cpus(config: FlyrayConfig) -> int:
    return config.engine.shards * config.engine.threads_per_shard


def describe(summary: BatchSummary, output: Path) -> str:
    """What happened, in a line or two."""
    seconds = max(summary.seconds, 1e-9)
    rate = f"{summary.answered / seconds:.1f} lines/s, {summary.completion_tokens / seconds:.0f} tokens/s"
    counts = f"{summary.succeeded} completed, {summary.failed} failed, {summary.invalid} invalid"
    lines = [f"{counts}, {summary.skipped} done before, in {summary.seconds:.1f} s ({rate}): {output}"]
    if summary.failed or summary.invalid:
        lines.append("Errors stand in the output, a line each; to run those lines again add --retry-errors.")
    if summary.foreign:
        lines.append(f"{summary.foreign} results in the output belong to no line of this input.")
    return "\n".join(lines)


def figures(summary: BatchSummary) -> list[Figure]:
    """batch.completed and the other counts, of this run."""
    seconds = max(summary.seconds, 1e-9)
    return [
        Figure("batch.completed", summary.succeeded, "lines"),
        Figure("batch.failed", summary.failed, "lines"),
        Figure("batch.invalid", summary.invalid, "lines"),
        Figure("batch.skipped", summary.skipped, "lines"),
        Figure("batch.prompt_tokens", summary.prompt_tokens, "tokens"),
        Figure("batch.completion_tokens", summary.completion_tokens, "tokens"),
        Figure("seconds.batch", summary.seconds, "seconds"),
        Figure("tok_s.batch", summary.completion_tokens / seconds, "tokens/s"),
    ]


class BatchProgress:
    """A progress bar over the bytes of the input, so that it needs no look ahead."""

    def __init__(self, console: Console) -> None:
        columns = (SpinnerColumn(), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._task = self._bar.add_task("starting", total=None)
        self.summary = BatchSummary()

    def __enter__(self) -> BatchProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def show(self, summary: BatchSummary) -> None:
        """Called after every line."""
        self.summary = summary
        seconds = max(summary.seconds, 1e-9)
        words = f"{summary.answered} lines, {summary.answered / seconds:.1f}/s"
        if errors := summary.failed + summary.invalid:
            words += f", {errors} errors"
        self._bar.update(self._task, completed=summary.done_bytes, total=summary.total_bytes, description=words)
