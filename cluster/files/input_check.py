"""Reads all of a batch's input before anything of it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..batch.line import BatchLine, LineError, parse_line, read_lines
from ..batch.output import fingerprint
from .batch_state import BatchFault

MOST_FAULTS = 100
"""Faults that are told one by one; how many there are beyond them is said in one more."""


@dataclass(frozen=True)
class CheckedInput:
    """lines: requests to run. faults: what is wrong with the file, by line; a batch over it fails if there are any."""

    lines: int
    faults: tuple[BatchFault, ...]


def check_input(path: Path, endpoint: str) -> CheckedInput:
    """Checks every line but not the bodies, which are the endpoint's business. Raises OSError."""
    seen: dict[int, int] = {}
    faults: list[BatchFault] = []
    wrong = 0
    with path.open("rb") as file:
        for raw in read_lines(file):
            try:
                _check(parse_line(raw), endpoint, seen)
            except LineError as error:
                wrong += 1
                if wrong <= MOST_FAULTS:
                    faults.append(BatchFault(error.code, str(error), error.number, error.field or None))
    if wrong > MOST_FAULTS:
        faults.append(BatchFault("more_invalid_lines", f"{wrong - MOST_FAULTS} more lines are wrong"))
    if not seen and not wrong:
        faults.append(BatchFault("empty_file", "the input has no lines"))
    return CheckedInput(len(seen), tuple(faults))


def _check(line: BatchLine, endpoint: str, seen: dict[int, int]) -> None:
    if line.url != endpoint:
        raise LineError(line.number, "url", f"is {line.url!r}, and the batch's endpoint {endpoint!r}", "mismatched_url")
    first = seen.setdefault(fingerprint(line.custom_id), line.number)
    if first != line.number:
        reason = f"{line.custom_id!r} stands already on line {first}"
        raise LineError(line.number, "custom_id", reason, "duplicate_custom_id")
