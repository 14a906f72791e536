"""A sensitivity file for people and for files: the losses by layer and group, the checks, and their figures."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ..evaluate.intervals import Interval
from ..figures import Figure
from .sensitivity import Loss, Sensitivity


def print_sensitivity(found: Sensitivity, console: Console) -> None:
    """A table of the units and one of the choices that were measured as a whole."""
    console.print(_units(found))
    if found.checks:
        console.print(_checks(found))


def _units(found: Sensitivity) -> Table:
    table = Table(
        title=f"Loss in KL divergence at {found.low}, millinats a token over all {found.high}", box=box.SIMPLE_HEAD
    )
    table.caption = (
        f"{found.tokens:,} tokens of {found.documents} documents; experts grouped by {found.grouping}; all "
        f"{found.high} lose {1000 * found.base.kl.value:.3f} millinats"
    )
    table.add_column("layer", justify="right")
    for group in range(found.groups):
        table.add_column(f"group {group}", justify="right")
    table.add_column("sum", justify="right")
    for layer in found.layers:
        units = found.layer_units(layer)
        cells = [
            f"{1000 * unit.loss.kl.value:.3f} ±{500 * (unit.loss.kl.high - unit.loss.kl.low):.3f}" for unit in units
        ]
        table.add_row(str(layer), *cells, f"{1000 * sum(unit.loss.kl.value for unit in units):.3f}")
    return table


def _checks(found: Sensitivity) -> Table:
    table = Table(title="Mixed choices measured as a whole, loss in millinats", box=box.SIMPLE_HEAD)
    for name in ("high", "experts, MB", "predicted", "measured", "perplexity", "top-1, points"):
        table.add_column(name, justify="right")
    for check in found.checks:
        table.add_row(
            f"{check.share:.0%}",
            f"{check.bytes / 1e6:,.1f}",
            f"{1000 * check.predicted:.3f}",
            _millinats(check.loss.kl),
            f"{check.loss.perplexity_ratio.value - 1:+.3%}",
            f"{100 * check.loss.top1.value:+.2f}",
        )
    return table


def _millinats(kl: Interval) -> str:
    return f"{1000 * kl.value:.3f} ±{500 * (kl.high - kl.low):.3f}"


def figures(found: Sensitivity) -> list[Figure]:
    """sensitivity.kl.LAYER.GROUP (nats a token, with .low and .high), and for every measured choice
    sensitivity.{predicted,kl,perplexity_ratio,top1,bytes}.mixed-SHARE."""
    listed: list[Figure] = []
    for layer in found.layers:
        for group, unit in enumerate(found.layer_units(layer)):
            name, kl = f"sensitivity.kl.layer-{layer}.group-{group}", unit.loss.kl
            listed += [Figure(name, kl.value, "nats/token"), Figure(f"{name}.low", kl.low, "nats/token")]
            listed.append(Figure(f"{name}.high", kl.high, "nats/token"))
    for check in found.checks:
        label = f"mixed-{100 * check.share:g}"
        listed.append(Figure(f"sensitivity.predicted.{label}", check.predicted, "nats/token"))
        listed.append(Figure(f"sensitivity.bytes.{label}", check.bytes, "bytes"))
        listed += _loss_figures(label, check.loss)
    return [*listed, Figure("sensitivity.tokens", found.tokens, "tokens")]


def _loss_figures(label: str, loss: Loss) -> list[Figure]:
    listed = []
    for kind, interval, unit in (
        ("kl", loss.kl, "nats/token"),
        ("perplexity_ratio", loss.perplexity_ratio, "1"),
        ("top1", loss.top1, "1"),
    ):
        name = f"sensitivity.{kind}.{label}"
        listed += [Figure(name, interval.value, unit), Figure(f"{name}.low", interval.low, unit)]
        listed.append(Figure(f"{name}.high", interval.high, unit))
    return listed
