"""What the quantizing tests make once and then look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flyray.cluster.quantize.report import QuantizeReport

ALL = ("w4a8", "w8a8", "w8a8-fp8", "w4a8-channel")


@dataclass(frozen=True)
class Made:
    """A source, and what it was quantized into by format."""

    source: Path
    targets: dict[str, Path]
    reports: dict[str, QuantizeReport]
