"""From the names of formats and recipes to columns: what a checkpoint can be had in, and what must be made for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...actors.checkpoint import Checkpoint
from .columns import Column
from .quantized_cache import QUANTIZED_FORMATS, KeptCheckpoint, QuantizedCache

NATIVE = "w4a16"
UNQUANTIZED = "bf16"
ALL = "all"
FORMATS = (UNQUANTIZED, NATIVE, *QUANTIZED_FORMATS)
_SOURCES = (NATIVE, UNQUANTIZED)


class EvalError(ValueError):
    """What was asked for cannot be evaluated; the message says why and what can."""


@dataclass(frozen=True)
class Selection:
    """The columns of one checkpoint, and those of them that were quantized, by the columns' labels."""

    columns: tuple[Column, ...]
    kept: dict[str, KeptCheckpoint]


def select(path: Path, names: Sequence[str], work_dir: Path, *, prefix: str = "", compared: bool = True) -> Selection:
    """The columns of one checkpoint for formats; none or "all": every format.

    What must be quantized is taken from work_dir or made there, in the Ray that is initialized. prefix: of the labels.
    compared: the columns get a reference, the checkpoint's own weights, which is added if it was not asked for.
    Raises EvalError and what quantizing raises.
    """
    checkpoint = Checkpoint(path)
    own = checkpoint.expert_format()
    asked = _asked(path, names, own)
    compared = compared and own in _SOURCES
    if compared and own not in asked:
        asked = [own, *asked]
    missing = [name for name in asked if name in QUANTIZED_FORMATS and name != own]
    kept = QuantizedCache(work_dir, path).ensure(missing) if missing else {}
    reference = prefix + own if compared and len(asked) > 1 else ""
    columns = []
    for name in asked:
        if name in kept:
            columns.append(Column(prefix + name, kept[name].path, "auto", reference, kept[name].bytes))
        elif name == own:
            columns.append(Column(prefix + name, path, "auto", reference, tensor_bytes(checkpoint)))
        else:
            columns.append(Column(prefix + name, path, name, reference))
    return Selection(tuple(columns), kept)


def _asked(path: Path, names: Sequence[str], own: str) -> list[str]:
    possible = _every_format(own)
    asked = possible if not names or ALL in names else tuple(dict.fromkeys(names))
    for name in asked:
        if name not in FORMATS:
            raise EvalError(f"unknown format {name!r}; known are {', '.join(FORMATS)} and {ALL}")
        if name not in possible:
            raise EvalError(f"{path} is in {own} and cannot be had as {name}; take the one it came from")
    return list(asked)


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
    return (own, *QUANTIZED_FORMATS) if own == UNQUANTIZED else (own,)
