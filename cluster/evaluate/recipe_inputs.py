"""What a recipe needs beside the checkpoint, made where it is missing: a calibration, a sensitivity file.

Both are kept beside the quantized checkpoints, under names of all that they depend on. They are made of text that is
not the evaluated one: a recipe that has seen the questions would look better than it is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ...actors.checkpoint import Checkpoint
from ...actors.model.config import ModelConfig
from ...actors.statistics import Statistics, StatisticsError
from ..calibrate.command import CalibrationSettings, calibrate
from ..code_version import code_version, digest
from ..job import nothing
from ..quantize.plan_inputs import QuantizeInputs
from ..quantize.recipe import EXPERTS, Mixed, Recipe, Rule, Scheme
from ..sensitivity.command import MEASURING_CODE, SensitivitySettings, measure_sensitivity
from .perplexity import read_documents
from .quantized_cache import QuantizedCache
from .settings import EvalSettings

MAKING_CODE = ("cluster.calibrate", "cluster.sensitivity", *MEASURING_CODE)
MOST_BLOCK = 256
"""Columns of a block of second moments at most: they take 4 bytes a column times the block, an expert and matrix."""


class CalibrationTextError(ValueError):
    """A recipe needs a calibration, and the text for it is not there or is what is evaluated; the message says so."""


@dataclass(frozen=True)
class Calibrating:
    """text: what to calibrate with; None if the user gave none. evaluated: the text that must not be in it; None for
    none. end_now: ends all processes at a second signal."""

    text: Path | None
    evaluated: Path | None
    settings: EvalSettings
    console: Console
    end_now: Callable[[], None] = nothing


def check_disjoint(calibration: Path, evaluated: Path) -> None:
    """Raises CalibrationTextError when a document of one file is also in the other, TextError for a file of no text."""
    known = {document.text for document in read_documents(evaluated)}
    shared = sum(document.text in known for document in read_documents(calibration))
    if shared:
        raise CalibrationTextError(
            f"{calibration}: {shared} of its documents are also in {evaluated}, which is evaluated; give other text"
        )


def check_makeable(recipe: Recipe, calibrating: Calibrating) -> None:
    """Raises CalibrationTextError for a recipe whose inputs there is no text to make of, or none but what is
    evaluated; TextError for a file that is no text."""
    if not recipe.needs_calibration and recipe.mixed is None:
        return
    if calibrating.text is None:
        what = "a calibration" if recipe.needs_calibration else "a sensitivity file"
        raise CalibrationTextError(
            f"recipe {recipe.name} needs {what}: give text to make it of with --calibration-text FILE, "
            "none of which is evaluated"
        )
    if calibrating.evaluated is not None:
        check_disjoint(calibrating.text, calibrating.evaluated)


def make_inputs(cache: QuantizedCache, recipe: Recipe, calibrating: Calibrating) -> QuantizeInputs:
    """The inputs that a recipe needs, from the cache or made now, in the Ray that is initialized.

    Raises CalibrationTextError as `check_makeable`, and what `calibrate` and `measure_sensitivity` raise, Stopped
    included.
    """
    check_makeable(recipe, calibrating)
    text = calibrating.text
    if text is None:
        return QuantizeInputs()
    calibration = _calibration(cache, recipe, calibrating, text) if recipe.needs_calibration else None
    sensitivity = _sensitivity(cache, recipe, recipe.mixed, calibrating, text, calibration) if recipe.mixed else None
    return QuantizeInputs(calibration, sensitivity)


def moments_block(config: ModelConfig) -> int:
    """Columns of a block of second moments: the largest divisor of both widths of the experts up to `MOST_BLOCK`."""
    common = math.gcd(config.hidden_size, config.moe_intermediate_size)
    return max(size for size in range(1, min(common, MOST_BLOCK) + 1) if common % size == 0)


def _calibration(cache: QuantizedCache, recipe: Recipe, calibrating: Calibrating, text: Path) -> Path:
    """The statistics folder, with second moments if the recipe has error feedback."""
    checkpoint = Checkpoint(cache.source)
    needs_moments = any(scheme.error_feedback for scheme in recipe.schemes())
    block = moments_block(ModelConfig.from_dict(checkpoint.config)) if needs_moments else 0
    target = cache.folder / f"calibration-{_key([block, digest([text])])}"
    try:
        Statistics.open(target).check(checkpoint)
        return target
    except StatisticsError:
        pass  # not there, or not complete
    with_moments = f", with second moments in blocks of {block} columns" if block else ""
    calibrating.console.print(
        f"{recipe.name} needs a calibration: running {text.name} through {cache.source.name}{with_moments}",
        soft_wrap=True,
        highlight=False,
    )
    own = calibrating.settings
    settings = CalibrationSettings(text, moments_block=block, shards=own.shards, threads=own.threads * own.lanes)
    shape = (TextColumn("calibrating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*shape, console=calibrating.console, transient=True) as bars:
        bar = bars.add_task("tokens", total=None)
        calibrate(
            cache.source,
            target,
            settings,
            on_start=lambda tokens: bars.update(bar, total=tokens),
            on_tokens=lambda tokens: bars.advance(bar, tokens),
            end_now=calibrating.end_now,
        )
    return target


def _sensitivity(
    cache: QuantizedCache, recipe: Recipe, mixed: Mixed, calibrating: Calibrating, text: Path, calibration: Path | None
) -> Path:
    """The sensitivity file of the recipe's own two schemes."""
    schemes = {"low": mixed.low, "high": mixed.high}
    needed = {side: QuantizeInputs(calibration if each.needs_calibration else None) for side, each in schemes.items()}
    recipes = {side: _uniform(recipe, side, each) for side, each in schemes.items()}
    places = [cache.place(recipes[side], needed[side]).name for side in schemes]
    own = calibrating.settings
    target = cache.folder / f"sensitivity-{_key([*places, digest([text]), own.window])}.json"
    calibrating.console.print(
        f"{recipe.name} needs to know what each group of experts loses at {mixed.low.format}: "
        f"measured with {text.name}, if it is not known yet",
        soft_wrap=True,
        highlight=False,
    )
    made = cache.ensure_recipes({side: (recipes[side], needed[side]) for side in schemes})
    settings = SensitivitySettings(
        low=str(made["low"].path),
        high=str(made["high"].path),
        shares=(),
        window=own.window,
        shards=own.shards,
        threads=own.threads * own.lanes,
        concurrency=own.concurrency,
    )
    measure_sensitivity(
        cache.source,
        target,
        text,
        settings,
        work_dir=cache.folder.parent,
        console=calibrating.console,
        end_now=calibrating.end_now,
    )
    return target


def _uniform(recipe: Recipe, side: str, scheme: Scheme) -> Recipe:
    """A recipe that gives every routed expert one of the two schemes, whichever of them are mixed: a sensitivity is of
    checkpoints in one format each."""
    name = f"mixed-{side}"  # not the recipe's: several budgets share what is measured
    return Recipe(name=name, version=1, rules=(Rule(modules=(EXPERTS,), scheme=scheme),), smoothing=recipe.smoothing)


def _key(parts: list[str | int]) -> str:
    """Of what something was made from and of the code that makes it."""
    return hashlib.sha256(json.dumps([*parts, code_version(*MAKING_CODE)]).encode()).hexdigest()[:16]
