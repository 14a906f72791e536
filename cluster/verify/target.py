"""What is verified: a checkpoint folder, and the precision that its weights are loaded in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...kernels.formats import FORMATS

AUTO = "auto"


class VerifyError(ValueError):
    """What was asked for cannot be verified; the message says why."""


@dataclass(frozen=True)
class Target:
    """name: "A" or "B". precision: as in `EngineConfig`."""

    name: str
    path: Path
    precision: str

    def __str__(self) -> str:
        return f"{self.path}" if self.precision == AUTO else f"{self.path} as {self.precision}"


def parse_target(name: str, text: str) -> Target:
    """FOLDER or FOLDER:PRECISION; a folder whose whole name is `text` is that folder. Raises VerifyError."""
    if Path(text).is_dir():
        return Target(name, Path(text), AUTO)
    folder, colon, precision = text.rpartition(":")
    if not colon or not Path(folder).is_dir():
        raise VerifyError(f"{text}: no such checkpoint folder")
    if precision not in (AUTO, *FORMATS):
        raise VerifyError(f"{text}: precision {precision!r} is unknown; {AUTO} or one of {', '.join(FORMATS)} is right")
    return Target(name, Path(folder), precision)
