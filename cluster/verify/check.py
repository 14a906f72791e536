"""What a verification looked at and found: one check a line, with its number, its limit and its verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..figures import Figure, check_figures, replace_text, versions


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. detail: what was found, with the names of what is wrong. passed: None for a number
    that no limit was given for, and for what there is nothing to say about. limit: as "at most 0.02"."""

    name: str
    detail: str
    passed: bool | None
    limit: str = ""

    @property
    def verdict(self) -> str:
        if self.passed is None:
            return "-"
        return "ok" if self.passed else "FAIL"

    def line(self) -> str:
        """The check as a line of a report."""
        limit = f" (limit: {self.limit})" if self.limit else ""
        return f"{self.verdict:<4}  {self.name}: {self.detail}{limit}"


def at_most(name: str, value: float, limit: float | None, detail: str) -> Check:
    """A number that should not be above its limit; without one it is only told. NaN is above every limit."""
    return Check(name, detail, None, "") if limit is None else Check(name, detail, value <= limit, f"at most {limit:g}")


def at_least(name: str, value: float, limit: float | None, detail: str) -> Check:
    """A number that should not be below its limit; without one it is only told. NaN is below every limit."""
    return (
        Check(name, detail, None, "") if limit is None else Check(name, detail, value >= limit, f"at least {limit:g}")
    )


@dataclass(frozen=True)
class Verification:
    """All checks in the order in which they were made, and the figures for a file."""

    checks: tuple[Check, ...]
    figures: tuple[Figure, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def write(self, path: Path) -> None:
        """Writes what `write_figures` writes, and "passed" and "checks" beside it. Figures that are not finite (of
        weights with NaN) are left out: their check says so."""
        finite = [figure for figure in self.figures if math.isfinite(figure.value)]
        content = {
            "passed": self.passed,
            "checks": [asdict(check) | {"verdict": check.verdict} for check in self.checks],
            "figures": [asdict(figure) for figure in check_figures(finite)],
            "versions": versions(),
        }
        replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
