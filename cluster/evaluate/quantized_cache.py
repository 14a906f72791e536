"""Quantized checkpoints that are kept: made once for a source, a format and the code that quantizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..code_version import code_version, digest
from ..figures import Figure, replace_text

REPORT = "report.json"
QUANTIZED_FORMATS = ("w4a8", "w8a8", "w8a8-fp8", "w4a8-channel")
QUANTIZERS = ("cluster.quantize", "kernels.formats", "actors.checkpoint", "actors.expert_format")


@dataclass(frozen=True)
class KeptCheckpoint:
    """A quantized checkpoint in the cache, and what quantizing it found."""

    format: str
    path: Path
    bytes: int
    weight_error: float
    seconds: float

    def figures(self) -> list[Figure]:
        """weight_error.FORMAT, seconds.quantize.FORMAT."""
        return [
            Figure(f"weight_error.{self.format}", self.weight_error, "1"),
            Figure(f"seconds.quantize.{self.format}", self.seconds, "seconds"),
        ]


class QuantizedCache:
    """A folder of checkpoints made from one source. It is keyed by the source's content, so reading the whole source
    is the price of every use: 0.1 s for the demo model, minutes for hundreds of gigabytes."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.source = source
        self.key = f"{digest(sorted(source.glob('*')))}-{code_version(*QUANTIZERS)}"
        self.folder = folder / self.key

    def kept(self, format: str) -> KeptCheckpoint | None:
        """The checkpoint in a format, if it was finished."""
        path = self.folder / format
        try:
            values = json.loads((path / REPORT).read_text())
        except (OSError, ValueError):
            return None
        return KeptCheckpoint(path=path, **values)

    def ensure(self, formats: Sequence[str], workers: int | None = None) -> dict[str, KeptCheckpoint]:
        """The checkpoints in these formats; those that are missing are quantized, all in one run.

        Uses the Ray that is initialized, or one for the while. Raises what `quantize_all` raises.
        """
        missing = [format for format in formats if self.kept(format) is None]
        if missing:
            self._quantize(missing, workers)
        found = {format: self.kept(format) for format in formats}
        return {format: kept for format, kept in found.items() if kept is not None}

    def _quantize(self, formats: Sequence[str], workers: int | None) -> None:
        from ..quantize.command import QuantizeInputs, quantize_all
        from ..quantize.recipe import load_recipe

        targets: Mapping[str, Path] = {format: self.folder / f"{format}.part" for format in formats}
        for target in targets.values():
            shutil.rmtree(target, ignore_errors=True)
        recipes = {format: (load_recipe(format), QuantizeInputs(), target) for format, target in targets.items()}
        reports = quantize_all(self.source, recipes, workers=workers)
        for format, report in reports.items():
            kept = KeptCheckpoint(
                format=format,
                path=self.folder / format,
                bytes=report.bytes_after,
                weight_error=report.weight_error,
                seconds=report.seconds,
            )
            values = asdict(kept)
            del values["path"]
            replace_text(targets[format] / REPORT, json.dumps(values))
            shutil.rmtree(kept.path, ignore_errors=True)
            targets[format].replace(kept.path)
