"""Runs a file of requests, many at a time, so that it can stop anywhere and go on later.

A line's result is written as soon as it is there; a later run with the same files skips what is done. A line that
cannot be run gets an error line, and the job goes on. Results stand in the order in which they were finished.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ..crew import work_through
from .line import Answer, BatchLine, LineError, RawLine, error_line, parse_line, read_lines, result_line
from .output import BatchFileError, BatchOutput, fingerprint


class ServiceLost(Exception):
    """What runs the requests is gone: nothing more can be answered, and the job stops where it is."""


class LineRunner(Protocol):
    """Runs one request. A request that is refused is an `Answer` too; ServiceLost says that none will be answered."""

    async def run(self, line: BatchLine) -> Answer: ...


@dataclass(frozen=True)
class BatchSummary:
    """What became of the input.

    succeeded and failed: requests answered in this run, with status 200 and another. invalid: lines that got an error
    line in this run. skipped: lines that an earlier run finished. kept_succeeded and kept_failed: results that stood in
    the output before this run. foreign: those of them that belong to no line of the input, known at the end.
    total_bytes: size of the input; done_bytes: of its lines finished in any way.
    """

    succeeded: int = 0
    failed: int = 0
    invalid: int = 0
    skipped: int = 0
    kept_succeeded: int = 0
    kept_failed: int = 0
    foreign: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    done_bytes: int = 0
    total_bytes: int = 0

    @property
    def answered(self) -> int:
        return self.succeeded + self.failed


class BatchJob:
    """One run over one pair of files."""

    def __init__(
        self,
        runner: LineRunner,
        input_path: Path,
        output_path: Path,
        *,
        concurrency: int,
        retry_errors: bool = False,
        on_progress: Callable[[BatchSummary], None] | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; at least one request must run")
        if not input_path.is_file():
            raise BatchFileError(f"{input_path} is not a file")
        if output_path.exists() and output_path.samefile(input_path):
            raise BatchFileError(f"{input_path} is named as input and as output")
        self._runner = runner
        self._input_path = input_path
        self._output_path = output_path
        self._concurrency = concurrency
        self._retry_errors = retry_errors
        self._on_progress = on_progress
        self._counts = Counter[str]()
        self._seen: dict[int, int] = {}
        self._foreign = 0
        self._total_bytes = input_path.stat().st_size
        self._begin = time.monotonic()

    @property
    def summary(self) -> BatchSummary:
        """How far the job is; also while it runs, and after it was stopped."""
        return BatchSummary(
            **self._counts,
            foreign=self._foreign,
            seconds=time.monotonic() - self._begin,
            total_bytes=self._total_bytes,
        )

    async def run(self) -> BatchSummary:
        """Runs what is not done yet.

        Raises BatchFileError before anything runs, ServiceLost in the middle; what was finished stays in the output.
        """
        self._begin = time.monotonic()
        with await self._open_output() as output, self._input_path.open("rb") as file:
            self._counts.update(kept_succeeded=output.succeeded, kept_failed=output.failed)
            await work_through(read_lines(file), partial(self._work, output), self._concurrency)
            known = sum(output.is_done(mark) for mark in self._seen)
            self._foreign = output.results - known
        return self.summary

    async def _open_output(self) -> BatchOutput:
        """In a thread: reading gigabytes back must not hold up whatever else this event loop runs."""
        opening = asyncio.ensure_future(
            asyncio.to_thread(BatchOutput, self._output_path, drop_errors=self._retry_errors)
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            (await opening).close()
            raise

    async def _work(self, output: BatchOutput, raw: RawLine) -> None:
        """Waits for a line's answer and writes it."""
        if line := self._accept(raw, output):
            answer = await self._runner.run(line)
            output.append([result_line(line, answer)])
            self._count_answer(answer)
        self._counts["done_bytes"] += raw.length
        if self._on_progress:
            self._on_progress(self.summary)

    def _accept(self, raw: RawLine, output: BatchOutput) -> BatchLine | None:
        """The line's request if it must run now; else None, and the reason is counted and, when new, written."""
        try:
            line = parse_line(raw)
            mark = fingerprint(line.custom_id)
            first = self._seen.setdefault(mark, raw.number)
            if first != raw.number:
                reason = f"{line.custom_id!r} stands already on line {first}"
                raise LineError(raw.number, "custom_id", reason, "duplicate_custom_id")
        except LineError as error:
            if output.is_reported(raw.number):
                self._counts["skipped"] += 1
            else:
                output.append([error_line(error)])
                self._counts["invalid"] += 1
            return None
        if output.is_done(mark):
            self._counts["skipped"] += 1
            return None
        return line

    def _count_answer(self, answer: Answer) -> None:
        self._counts["succeeded" if answer.ok else "failed"] += 1
        usage = answer.body.get("usage")
        if answer.ok and isinstance(usage, dict):
            for name in ("prompt_tokens", "completion_tokens"):
                self._counts[name] += usage.get(name, 0)


async def run_batch(
    runner: LineRunner,
    input_path: Path,
    output_path: Path,
    *,
    concurrency: int,
    retry_errors: bool = False,
    on_progress: Callable[[BatchSummary], None] | None = None,
) -> BatchSummary:
    """Runs the job of `BatchJob` to its end."""
    job = BatchJob(
        runner, input_path, output_path, concurrency=concurrency, retry_errors=retry_errors, on_progress=on_progress
    )
    return await job.run()
