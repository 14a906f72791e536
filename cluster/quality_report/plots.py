"""The report's plots, each a function from what was measured to an <svg> element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from ..evaluate.intervals import Interval
from ..quantize.mixed import choose, expert_sizes
from ..sensitivity.sensitivity import Sensitivity
from .inputs import Evaluation, Quantized
from .svg import GRID, MUTED, SERIES, SURFACE, canvas, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 8.4
_KINDS = ("gate_proj", "up_proj", "down_proj")
_BINS = 60
# Points of a name's line and letter, and half of a mark.
_LINE, _LETTER, _MARK = 11.0, 6.0, 4.0


def loss_by_layer(found: Sensitivity) -> Markup:
    """Every unit's loss with its interval, by layer; the layer's sum as a bar behind."""
    with canvas(WIDTH, 3.4) as (figure, (axes,)):
        layers = found.layers
        sums = [1000 * sum(unit.loss.kl.value for unit in found.layer_units(layer)) for layer in layers]
        axes.bar(layers, sums, width=0.84, color=GRID, label="whole layer (sum)", zorder=1)
        for group in range(found.groups):
            units = [(layer, units[group]) for layer in layers if len(units := found.layer_units(layer)) > group]
            spread = 0.6 * ((group + 0.5) / found.groups - 0.5)
            _points(
                axes,
                [layer + spread for layer, _ in units],
                [_scaled(unit.loss.kl, 1000) for _, unit in units],
                SERIES[group % len(SERIES)],
                _group_name(found, group),
                size=6 if len(layers) <= 16 else 3.5,
            )
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_xlabel("layer")
        axes.set_ylabel("loss, millinats a token")
        axes.set_xticks(_every(layers, 20))
        axes.grid(axis="y", linewidth=0.6)
        figure.legend(loc="outside upper center", ncols=min(found.groups + 1, 5))
        return to_svg(figure, "layers", f"Loss by layer and expert group at {found.low}")


def budget_curve(found: Sensitivity) -> Markup:
    """Bytes of the routed experts against the loss of the best choice: predicted, and as measured."""
    choices = [choose(found, f"{percent}%", *expert_sizes(found)) for percent in range(101)]
    with canvas(WIDTH, 3.2) as (figure, (axes,)):
        sizes, unit = _bytes([choice.bytes for choice in choices])
        predicted = [1000 * choice.predicted for choice in choices]
        axes.plot(sizes, predicted, color=SERIES[0], linewidth=2, label="predicted: sum of the units' losses")
        ends = [sizes[0], sizes[-1]], [predicted[0], 0.0]
        axes.plot(*ends, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="experts chosen at random")
        if found.checks:
            scale = sizes[0] / choices[0].bytes
            places = [check.bytes * scale for check in found.checks]
            values = [_scaled(check.loss.kl, 1000) for check in found.checks]
            _points(axes, places, values, SERIES[1], "measured, with 95 % interval", size=6)
        axes.set_xlabel(f"bytes of the routed experts, {unit}")
        axes.set_ylabel("loss, millinats a token")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(linewidth=0.6)
        axes.legend()
        return to_svg(figure, "budget", "Loss against the byte budget, predicted and measured")


def error_histograms(quantized: Sequence[Quantized]) -> Markup:
    """How many matrices have which relative error, a row a checkpoint, coloured by projection."""
    shown = [each for each in quantized if any(matrix.relative > 0 for matrix in each.matrices)]
    errors = [matrix.relative for each in shown for matrix in each.matrices if matrix.relative > 0]
    first, last = math.log10(min(errors)) - 0.02, math.log10(max(errors)) + 0.02
    bins = [10 ** (first + (last - first) * place / _BINS) for place in range(_BINS + 1)]
    with canvas(WIDTH, 0.9 + 1.05 * len(shown), rows=len(shown)) as (figure, rows):
        for axes, each in zip(rows, shown, strict=True):
            kinds = [kind for kind in _all_kinds(each) if any(matrix.kind == kind for matrix in each.matrices)]
            values = [[matrix.relative for matrix in each.matrices if matrix.kind == kind] for kind in kinds]
            colours = [SERIES[_all_kinds(each).index(kind) % len(SERIES)] for kind in kinds]
            axes.hist(values, bins=bins, stacked=True, color=colours, label=kinds, edgecolor=SURFACE, linewidth=0.3)
            axes.set_xscale("log")
            # One matrix among thousands is no visible bar.
            worst = max(max(each_kind) for each_kind in values)
            axes.axvline(worst, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            axes.set_title(f"worst {worst:.2%}", loc="right", fontsize=9, color=MUTED)
            axes.set_ylabel("matrices")
            axes.set_title(f"{each.label} ({', '.join(each.formats)})", loc="left", fontsize=10)
            axes.grid(axis="y", linewidth=0.6)
        _percent_ticks(rows[-1])
        rows[-1].set_xlabel("relative error of a matrix (Frobenius norm)")
        handles, labels = rows[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=max(1, len(labels)))
        return to_svg(figure, "errors", "Histograms of the matrices' relative errors")


def bytes_against(evaluation: Evaluation, kind: str, ends: tuple[str, str] | None = None) -> Markup | None:
    """Bytes on disk against "perplexity_ratio" or "kl", with intervals; None if fewer than two columns have both.

    ends: labels of the low and the high format of a mixed recipe; a line is drawn between them.
    """
    columns = [column for column in evaluation.columns if column.bytes and getattr(column, kind) is not None]
    if len(columns) < 2:
        return None
    factor = 1000 if kind == "kl" else 100
    shift = 0 if kind == "kl" else -1
    with canvas(WIDTH, 3.6) as (figure, (axes,)):
        sizes, unit = _bytes([column.bytes or 0 for column in columns])
        values = [_scaled(_shifted(getattr(column, kind), shift), factor) for column in columns]
        places = {column.label: (size, value.value) for column, size, value in zip(columns, sizes, values, strict=True)}
        if ends and ends[0] in places and ends[1] in places:
            line = [places[end] for end in ends]
            axes.plot(
                [x for x, _ in line],
                [y for _, y in line],
                color=MUTED,
                linewidth=1,
                linestyle=(0, (4, 3)),
                label=f"straight line from {ends[0]} to {ends[1]}",
            )
            axes.legend()
        for column, size, value in zip(columns, sizes, values, strict=True):
            mixed = "mixed" in column.label
            _points(axes, [size], [value], SERIES[1 if mixed else 0], None, size=7, marker="D" if mixed else "o")
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.margins(x=0.12, y=0.16)
        if kind == "kl":  # is never negative
            axes.set_ylim(bottom=-0.05 * axes.get_ylim()[1])
        _name_points(axes, [(c.label, x, y) for c, x, y in zip(columns, sizes, values, strict=True)])
        axes.set_xlabel(f"bytes on disk, {unit}")
        name = "KL divergence, millinats a token" if kind == "kl" else "perplexity above the reference's, %"
        axes.set_ylabel(name)
        axes.grid(linewidth=0.6)
        return to_svg(figure, f"bytes-{kind.replace('_', '-')}", f"Bytes on disk against {name}")


def task_shares(evaluation: Evaluation) -> Markup | None:
    """The share of all tasks that every column got right, with intervals; None if none was asked."""
    rows = [(column.label, share) for column in evaluation.columns if (share := evaluation.task_share(column))]
    if not rows:
        return None
    with canvas(WIDTH, 0.9 + 0.32 * len(rows)) as (figure, (axes,)):
        for place, (_, share) in enumerate(rows):
            percent = _scaled(share, 100)
            bar = [[percent.value - percent.low], [percent.high - percent.value]]
            axes.errorbar(
                [100 * share.value],
                [place],
                xerr=bar,
                fmt="o",
                color=SERIES[0],
                markersize=7,
                elinewidth=1.6,
                capsize=0,
            )
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("tasks done right, %, with 95 % interval")
        axes.grid(axis="x", linewidth=0.6)
        return to_svg(figure, "tasks", "Share of tasks done right")


def _points(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[Interval],
    colour: str,
    label: str | None,
    size: float = 4.5,
    marker: str = "o",
) -> None:
    """Estimates with their intervals."""
    below = [value.value - value.low for value in values]
    above = [value.high - value.value for value in values]
    axes.errorbar(
        places,
        [value.value for value in values],
        yerr=[below, above],
        fmt=marker,
        color=colour,
        markersize=size,
        markeredgecolor=SURFACE,
        markeredgewidth=0.8,
        elinewidth=1.4,
        capsize=0,
        label=label,
        zorder=3,
    )


def _name_points(axes: Axes, points: Sequence[tuple[str, float, Interval]]) -> None:
    """Writes names above points, higher where a point or another name is in the way."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    # In points, for a figure has 72 dots an inch; the last layout will shrink the axes a little.
    width, height = axes.bbox.width * 0.9, axes.bbox.height * 0.9

    def at(x: float, y: float) -> tuple[float, float]:
        return (x - left) / (right - left) * width, (y - bottom) / (top - bottom) * height

    taken = [(at(x, y.value)[0], _MARK, at(x, y.value)[1] - _LINE / 2) for _, x, y in points]
    for label, x, y in sorted(points, key=lambda point: point[2].high):
        centre, base = at(x, y.high)
        half, line = _LETTER * len(label) / 2, base + 6
        while any(abs(centre - other) < half + reach and abs(line - place) < _LINE for other, reach, place in taken):
            line += 2
        taken.append((centre, half, line))
        offset = (0, line - base)
        axes.annotate(label, (x, y.high), xytext=offset, textcoords="offset points", ha="center", fontsize=9)


def _percent_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _all_kinds(each: Quantized) -> list[str]:
    """Projections of routed experts first, so that their colours are the same for all checkpoints."""
    return [*_KINDS, *sorted({matrix.kind for matrix in each.matrices} - set(_KINDS))]


def _group_name(found: Sensitivity, group: int) -> str:
    if found.grouping == "use":
        return f"group {group}" + (
            " (most used)" if group == 0 else " (least used)" if group == found.groups - 1 else ""
        )
    return f"group {group}"


def _bytes(sizes: Sequence[int]) -> tuple[list[float], str]:
    unit, name = (1e9, "GB") if max(sizes) >= 1e9 else (1e6, "MB")
    return [size / unit for size in sizes], name


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(factor * interval.value, factor * interval.low, factor * interval.high)


def _shifted(interval: Interval, by: float) -> Interval:
    return Interval(interval.value + by, interval.low + by, interval.high + by)


def _every(layers: Sequence[int], most: int) -> list[int]:
    """At most so many of the layers, evenly."""
    return list(layers[:: -(-len(layers) // most)])
