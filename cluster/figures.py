"""The measured numbers of a run as a file: what every ``--json FILE`` of flyray writes.

``{"figures": [{"name": …, "value": …, "unit": …}], "versions": {…}}``. A name is dotted, most general part first
(``perplexity.w4a8``); a unit is a word ("seconds", "bytes", "tokens/s") or "1" for a plain ratio or count.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = ("flyray", "torch", "ray", "numpy", "safetensors", "tiktoken", "amd-quark", "transformers")


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    value: float | int
    unit: str


def versions() -> dict[str, str]:
    """The versions that the numbers depend on: Python, the machine, and the packages that are installed."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_figures(figures: Iterable[Figure]) -> list[Figure]:
    """Returns the figures as a list.

    Raises ValueError naming the figure when a name is empty or comes twice, a unit is empty, or a value is not a
    finite number: JSON has no NaN, and a table that shows one is a run that failed.
    """
    checked: dict[str, Figure] = {}
    for figure in figures:
        if not figure.name or not figure.unit:
            raise ValueError(f"figure {figure.name!r} has unit {figure.unit!r}: both must be given")
        if isinstance(figure.value, bool) or not math.isfinite(figure.value):
            raise ValueError(f"figure {figure.name!r} is {figure.value!r}: a finite number is needed")
        if figure.name in checked:
            raise ValueError(f"figure {figure.name!r} is given twice: {checked[figure.name].value} and {figure.value}")
        checked[figure.name] = figure
    return list(checked.values())


def write_figures(path: str | Path, figures: Iterable[Figure], more: Mapping[str, object] | None = None) -> None:
    """Writes the figures and the versions to ``path``: the whole file or, on any error, nothing. more: what else stands
    beside them."""
    path = Path(path)
    content = {"figures": [asdict(figure) for figure in check_figures(figures)], "versions": versions()} | dict(
        more or {}
    )
    replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_figures(path: str | Path) -> dict[str, Figure]:
    """Reads what :func:`write_figures` wrote, by name."""
    content = json.loads(Path(path).read_text())
    return {entry["name"]: Figure(**entry) for entry in content["figures"]}


def replace_text(path: Path, text: str) -> None:
    """Puts ``text`` in ``path`` in one step, so that no reader and no crash ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
