"""From the names of formats and recipes to columns: what a checkpoint can be had in, and what must be made for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...actors.checkpoint import Checkpoint
from ..quantize.matrix import TARGET_FORMATS
from ..quantize.recipe import Recipe, load_recipe, shipped
from .columns import Column
from .quantized_cache import KeptCheckpoint, QuantizedCache
from .recipe_inputs import Calibrating, check_makeable, make_inputs

NATIVE = "w4a16"
UNQUANTIZED = "bf16"
ALL = "all"
FORMATS = (UNQUANTIZED, NATIVE, *TARGET_FORMATS)
_SOURCES = (NATIVE, UNQUANTIZED)
_RECIPE_FILE = (".yaml", ".yml")


class EvalError(ValueError):
    """What was asked for cannot be evaluated; the message says why and what can."""


@dataclass(frozen=True)
class Wanted:
    """One name that was asked for. recipe: how to make it; None for a format that is only loaded. from_file: the
    recipe is the user's own."""

    label: str
    recipe: Recipe | None
    from_file: bool = False


@dataclass(frozen=True)
class Selection:
    """The columns of one checkpoint, and those of them that were quantized, by the columns' labels."""

    columns: tuple[Column, ...]
    kept: dict[str, KeptCheckpoint]


def select(
    path: Path,
    names: Sequence[str],
    work_dir: Path,
    calibrating: Calibrating,
    *,
    prefix: str = "",
    compared: bool = True,
) -> Selection:
    """The columns of one checkpoint for formats, shipped recipes and recipes' files; none or "all": every format.

    What must be quantized is taken from work_dir or made there, in the Ray that is initialized, with what that needs
    (`make_inputs`). prefix: of the labels. compared: the columns get a reference, the checkpoint's own weights, which
    is added if it was not asked for. Raises EvalError, QuantizeError, and what quantizing and calibrating raise.
    """
    checkpoint = Checkpoint(path)
    own = checkpoint.expert_format()
    asked = wanted_of(names, own)
    for each in asked:
        _check_possible(path, each, own)
    compared = compared and own in _SOURCES
    if compared and own not in {each.label for each in asked}:
        asked = [Wanted(own, None), *asked]
    recipes = [each.recipe for each in asked if each.recipe and each.label != own]
    kept = _quantized(QuantizedCache(work_dir, path), recipes, calibrating) if recipes else {}
    reference = prefix + own if compared and len(asked) > 1 else ""
    columns = []
    for each in asked:
        label = prefix + each.label
        if each.label in kept:
            found = kept[each.label]
            columns.append(Column(label, found.path, "auto", reference, found.bytes))
        elif each.label == own:
            columns.append(Column(label, path, "auto", reference, tensor_bytes(checkpoint)))
        else:
            columns.append(Column(label, path, each.label, reference))
    labelled = {prefix + label: replace(found, label=prefix + label) for label, found in kept.items()}
    return Selection(tuple(columns), labelled)


def _quantized(cache: QuantizedCache, recipes: Sequence[Recipe], calibrating: Calibrating) -> dict[str, KeptCheckpoint]:
    """The recipes' checkpoints by name. Inputs that cannot be made are found out before any is made."""
    for recipe in recipes:
        check_makeable(recipe, calibrating)
    return cache.ensure_recipes({recipe.name: (recipe, make_inputs(cache, recipe, calibrating)) for recipe in recipes})


def wanted_of(names: Sequence[str], own: str) -> list[Wanted]:
    """What the names stand for, each once. own: the checkpoint's format. Raises EvalError for an unknown name and for
    two recipes of one name, QuantizeError for a file that is no recipe."""
    if not names or ALL in names:
        names = [*_every_format(own), *(name for name in names if name != ALL)]
    found: dict[str, tuple[str, Wanted]] = {}
    for name in dict.fromkeys(names):
        wanted = _wanted(name)
        if wanted.label in found:
            raise EvalError(
                f"two recipes would both be called {wanted.label}: {found[wanted.label][0]} and {name}; rename a file"
            )
        found[wanted.label] = (name, wanted)
    return [wanted for _, wanted in found.values()]


def check_labels(columns: Sequence[Column]) -> None:
    """Raises EvalError when two columns would have one name."""
    labels = [column.label for column in columns]
    for label in labels:
        if labels.count(label) > 1:
            raise EvalError(f"two checkpoints would both be called {label.partition(':')[0]}; rename a folder")


def tensor_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(checkpoint.entry(name).bytes for name in checkpoint.names)


def _every_format(own: str) -> tuple[str, ...]:
    """All plain formats that a checkpoint can be had in."""
    if own == NATIVE:
        return FORMATS
    return (own, *TARGET_FORMATS) if own == UNQUANTIZED else (own,)


def _wanted(name: str) -> Wanted:
    if name in _SOURCES:
        return Wanted(name, None)
    if name not in shipped() and Path(name).suffix not in _RECIPE_FILE:
        known = dict.fromkeys((*FORMATS, *shipped()))
        raise EvalError(f"unknown format {name!r}; known are {', '.join(known)}, a recipe's .yaml file, and {ALL}")
    recipe = load_recipe(name)
    if recipe.name in _SOURCES:
        raise EvalError(
            f"{name}: a recipe cannot be called {recipe.name}, which is a format of its own; rename the file"
        )
    return Wanted(recipe.name, recipe, from_file=name not in shipped())


def _check_possible(path: Path, wanted: Wanted, own: str) -> None:
    is_own = wanted.label == own and not wanted.from_file
    if not (is_own or own == NATIVE or (own == UNQUANTIZED and wanted.recipe)):
        raise EvalError(f"{path} is in {own} and cannot be had as {wanted.label}; take the one it came from")
