"""Quantized checkpoints that are kept: made once for a source, a recipe with its inputs, and the quantizing code."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..code_version import digest
from ..figures import Figure, replace_text
from ..quantize.fingerprint import code_fingerprint, inputs_digests
from ..quantize.plan_inputs import QuantizeInputs
from ..quantize.recipe import Recipe, load_recipe

REPORT = "report.json"


@dataclass(frozen=True)
class KeptCheckpoint:
    """A quantized checkpoint in the cache, and what quantizing it found. label: the recipe's name."""

    label: str
    path: Path
    bytes: int
    weight_error: float
    seconds: float

    def figures(self) -> list[Figure]:
        """weight_error.LABEL, seconds.quantize.LABEL."""
        return [
            Figure(f"weight_error.{self.label}", self.weight_error, "1"),
            Figure(f"seconds.quantize.{self.label}", self.seconds, "seconds"),
        ]


class QuantizedCache:
    """A folder of what was made from one source. It is keyed by the source's content, so reading the whole source is
    the price of every use: 0.1 s for the demo model, minutes for hundreds of gigabytes."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.source = source
        self.folder = folder / digest(file for file in source.glob("*") if file.is_file())

    def place(self, recipe: Recipe, inputs: QuantizeInputs | None = None) -> Path:
        """Where a recipe's checkpoint is, or would be: a name of all that decides its content."""
        content = recipe.model_dump(mode="json", exclude={"name", "about"})
        whole = json.dumps([content, inputs_digests(inputs or QuantizeInputs()), code_fingerprint(recipe)])
        return self.folder / f"{recipe.name}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"

    def kept(self, recipe: Recipe, inputs: QuantizeInputs | None = None) -> KeptCheckpoint | None:
        """A recipe's checkpoint, if it was finished."""
        return _read(self.place(recipe, inputs))

    def ensure(self, names: Sequence[str]) -> dict[str, KeptCheckpoint]:
        """The checkpoints of shipped recipes that need no inputs, such as every format's; see `ensure_recipes`."""
        return self.ensure_recipes({name: (load_recipe(name), QuantizeInputs()) for name in names})

    def ensure_recipes(
        self, wanted: Mapping[str, tuple[Recipe, QuantizeInputs]], workers: int | None = None
    ) -> dict[str, KeptCheckpoint]:
        """The checkpoints of recipes by any labels; those that are missing are quantized, all in one run, which goes on
        where a stopped one was.

        Uses the Ray that is initialized, or one for the while. Raises what `quantize_all` raises.
        """
        places = {label: self.place(*each) for label, each in wanted.items()}
        found = {label: _read(place) for label, place in places.items()}
        missing = {label: each for label, each in wanted.items() if found[label] is None}
        made = self._quantize(missing, places, workers) if missing else {}
        return {label: kept for label, kept in (found | made).items() if kept is not None}

    def _quantize(
        self, wanted: Mapping[str, tuple[Recipe, QuantizeInputs]], places: Mapping[str, Path], workers: int | None
    ) -> dict[str, KeptCheckpoint]:
        from ..quantize.command import quantize_all

        parts = {label: places[label].with_name(f"{places[label].name}.part") for label in wanted}
        targets = {label: (recipe, inputs, parts[label]) for label, (recipe, inputs) in wanted.items()}
        reports = quantize_all(self.source, targets, workers=workers, overwrite=True)
        made = {}
        for label, report in reports.items():
            kept = made[label] = KeptCheckpoint(
                label=wanted[label][0].name,
                path=places[label],
                bytes=report.bytes_after,
                weight_error=report.weight_error,
                seconds=report.seconds,
            )
            values = asdict(kept)
            del values["path"]
            replace_text(parts[label] / REPORT, json.dumps(values))
            shutil.rmtree(kept.path, ignore_errors=True)
            parts[label].replace(kept.path)
        return made


def _read(path: Path) -> KeptCheckpoint | None:
    """The checkpoint in a folder of the cache, if it was finished."""
    try:
        values = json.loads((path / REPORT).read_text())
    except (OSError, ValueError):
        return None
    return KeptCheckpoint(path=path, **values)
