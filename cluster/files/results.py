"""From the answers of a batch, as they came, to the two files that its client gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..batch.line import LineError, error_result, parse_line, read_lines
from ..batch.output import BatchOutput, fingerprint
from .batch_state import BatchOrder, BatchState, BatchUsage
from .file_store import BATCH_OUTPUT, FileStore, NewFile

EXPIRED = "This request could not be executed before the completion window expired."


@dataclass
class _Counts:
    completed: int = 0
    failed: int = 0
    usage: BatchUsage = field(default_factory=BatchUsage)


def publish_results(
    files: FileStore, order: BatchOrder, state: BatchState, results: Path, clock: Callable[[], float]
) -> BatchState:
    """Writes both files and gives the batch's last state. May be done again after a crash in the middle.

    A file that was published by then stays as it is; answers that were finished are all in. Raises OSError.
    """
    counts = _Counts()
    with files.create(state.output_file) as output, files.create(state.error_file) as errors:
        for line in _finished(results):
            _sort(line, output, errors, counts)
        if state.outcome == "expired":
            for line in _unfinished(files.content(order.input_file_id), results):
                errors.write(line)
                counts.failed += 1
        kept = [
            _keep(files, file, f"{order.id}_{kind}.jsonl") for file, kind in ((output, "output"), (errors, "error"))
        ]
    return state.to(
        state.outcome,
        completed=counts.completed,
        failed=counts.failed,
        usage=counts.usage,
        output_file=kept[0],
        error_file=kept[1],
        ended_at=int(clock()),
    )


def _keep(files: FileStore, file: NewFile, filename: str) -> str:
    """The file's id, or "" for an empty one, which is not kept."""
    if not file.size:
        return ""
    try:
        return files.get(file.id).id
    except LookupError:
        return file.keep(filename, BATCH_OUTPUT).id


def _finished(results: Path) -> Iterator[bytes]:
    """Whole lines; a last one that was torn by a crash is left out."""
    if results.exists():
        with results.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def _sort(line: bytes, output: NewFile, errors: NewFile, counts: _Counts) -> None:
    response = json.loads(line)["response"]
    if response is not None and response["status_code"] == 200:
        output.write(line)
        counts.completed += 1
        counts.usage = counts.usage.plus(response["body"].get("usage") or {})
    else:
        errors.write(line)
        counts.failed += 1


def _unfinished(content: Path, results: Path) -> Iterator[bytes]:
    """An error line for each request without a result."""
    with BatchOutput(results) as done, content.open("rb") as file:
        for raw in read_lines(file):
            try:
                line = parse_line(raw)
            except LineError:  # not in a file that was checked
                continue
            if not done.is_done(fingerprint(line.custom_id)):
                yield error_result(line.custom_id, "batch_expired", EXPIRED)
