"""What a recipe may need beside the checkpoint: a calibration, a sensitivity file, a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .matrix import QuantizeError
from .recipe import Recipe


@dataclass(frozen=True)
class QuantizeInputs:
    """calibration: a statistics folder. sensitivity: a file of `flyray sensitivity`. budget: instead of the recipe's
    own, bytes of all routed experts ("400 GB") or a share of the way from all low to all high ("50%")."""

    calibration: Path | None = None
    sensitivity: Path | None = None
    budget: str | None = None

    def check(self, recipe: Recipe) -> None:
        """Raises QuantizeError for an input that the recipe needs and does not get, or gets and does not need."""
        for option, given, needed, remedy in (
            ("calibration", self.calibration, recipe.needs_calibration, "run `flyray calibrate` and give its folder"),
            ("sensitivity", self.sensitivity, recipe.mixed is not None, "run `flyray sensitivity` and give its file"),
        ):
            if needed and given is None:
                raise QuantizeError(f"recipe {recipe.name} needs --{option}: {remedy}")
            if given is not None and not needed:
                raise QuantizeError(f"recipe {recipe.name} does not use --{option}; leave it out")
            if given is not None and not given.exists():
                raise QuantizeError(f"{given}: the {option} is not there")
        if self.budget is not None and recipe.mixed is None:
            raise QuantizeError(f"recipe {recipe.name} is not mixed and does not use --budget; leave it out")
