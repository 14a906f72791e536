"""What the quantizing tests make once and then look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.quantize.command import QuantizeInputs, quantize
from flyray.cluster.quantize.recipe import Recipe, load_recipe
from flyray.cluster.quantize.report import QuantizeReport

ALL = ("w4a8", "w8a8", "w8a8-fp8", "w4a8-channel")


@dataclass(frozen=True)
class Made:
    """A source, and what it was quantized into by format."""

    source: Path
    targets: dict[str, Path]
    reports: dict[str, QuantizeReport]


def shipped_targets(targets: Mapping[str, Path]) -> dict[str, tuple[Recipe, QuantizeInputs, Path]]:
    """What `quantize_all` takes, for shipped recipes by name."""
    return {name: (load_recipe(name), QuantizeInputs(), target) for name, target in targets.items()}


def quantize_by(name: str, source: Path, target: Path, **options: Any) -> QuantizeReport:
    """Quantizes by a shipped recipe that needs no inputs."""
    return quantize(source, target, load_recipe(name), progress=False, **options)


def recipe_of(*rules: Mapping[str, Any], exclude: tuple[str, ...] = (), **keys: Any) -> Recipe:
    """A recipe from its rules, as a file would hold them."""
    data = {"name": "mine", "version": 1, "rules": list(rules), "exclude": list(exclude), **keys}
    return Recipe.model_validate(yaml.safe_load(yaml.safe_dump(data)))


def parts_of(checkpoint: Checkpoint, module: str) -> dict[str, Tensor]:
    """A module's tensors by the last part of their names."""
    names = [name for name in checkpoint.names if name.rpartition(".")[0] == module]
    return {name.rpartition(".")[2]: checkpoint.read(name) for name in names}
