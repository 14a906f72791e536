"""Bars of measured rates as a PNG."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .rounds import BenchUsageError


@dataclass(frozen=True)
class Panel:
    """One plot: a bar a name, at the median of its values, with their least and most. limits: a mark a name, above
    which it cannot be; names without one have none."""

    title: str
    unit: str
    values: Mapping[str, Sequence[float]]
    limits: Mapping[str, float]


def check_plots() -> None:
    """Raises BenchUsageError where plots cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise BenchUsageError("plot: needs matplotlib; install it with: pip install 'flyray[plots]'")


def write_plot(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Writes the panels side by side to a PNG file."""
    check_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(panels) + 0.4, 3.6), layout="constrained", dpi=120)
    red = any(panel.limits for panel in panels)
    figure.suptitle(title + ("; red: the most that the memory's bandwidth allows" if red else ""), fontsize=9)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        names = list(panel.values)
        medians = [statistics.median(panel.values[name]) for name in names]
        below = [median - min(panel.values[name]) for name, median in zip(names, medians, strict=True)]
        above = [max(panel.values[name]) - median for name, median in zip(names, medians, strict=True)]
        axes.bar(range(len(names)), medians, yerr=(below, above), capsize=3, width=0.6, color="#4477aa")
        for place, name in enumerate(names):
            if name in panel.limits:
                axes.hlines(panel.limits[name], place - 0.4, place + 0.4, colors="#cc3311")
            axes.annotate(
                f"{medians[place]:.3g}", (place, 0), (0, 4), textcoords="offset points", ha="center", color="w"
            )
        axes.set_title(panel.title, fontsize=10)
        axes.set_ylabel(panel.unit)
        axes.set_xticks(range(len(names)), names, fontsize=8, rotation=90 if len(names) > 4 else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
