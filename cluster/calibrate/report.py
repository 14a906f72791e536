"""What calibrating gave, for people and for files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from ...actors.quantization_config import format_experts
from ...actors.statistics import Statistics
from ..figures import Figure


@dataclass(frozen=True)
class LayerLoad:
    """How one layer's experts were used. fewest, mean, most: tokens of an expert. unreached: experts without any."""

    layer: int
    fewest: int
    mean: float
    most: int
    unreached: tuple[int, ...]


@dataclass(frozen=True)
class CalibrationReport:
    """statistics: as they were written. seconds: of running the text, without start and stop of the engine. bytes: of
    the statistics on disk."""

    statistics: Statistics
    seconds: float
    bytes: int

    @property
    def tokens(self) -> int:
        return self.statistics.tokens

    @property
    def loads(self) -> tuple[LayerLoad, ...]:
        """Of every layer with routed experts."""
        return tuple(_load(self.statistics, layer) for layer in self.statistics.layers)

    @property
    def unreached(self) -> tuple[str, ...]:
        """The names of experts that no token came to."""
        return tuple(f"model.layers.{layer}.mlp.experts.{expert}" for layer, expert in self.statistics.unreached)


def figures(report: CalibrationReport) -> list[Figure]:
    """The numbers of a report. expert_load.max and .min: tokens of the most and least used expert of any layer, over
    the mean of its layer."""
    loads = report.loads
    return [
        Figure("calibrate.tokens", report.tokens, "tokens"),
        Figure("calibrate.seconds", report.seconds, "seconds"),
        Figure("calibrate.rate", report.tokens / report.seconds, "tokens/s"),
        Figure("calibrate.bytes", report.bytes, "bytes"),
        Figure("experts.total", len(loads) * report.statistics.plan.num_experts, "1"),
        Figure("experts.unreached", len(report.unreached), "1"),
        Figure("expert_load.max", max(load.most / load.mean for load in loads), "1"),
        Figure("expert_load.min", min(load.fewest / load.mean for load in loads), "1"),
    ]


def show(report: CalibrationReport, console: Console) -> None:
    """Prints the loads of all layers and the names of experts that were not reached."""
    console.print(_table(report))
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, expert in report.statistics.unreached:
        by_layer[layer].append(expert)
    if not by_layer:
        console.print("every expert was reached")
        return
    console.print("never reached, to be quantized without statistics (more, or more varied, text may reach them):")
    for layer, experts in by_layer.items():
        console.print(f"  model.layers.{layer}.mlp.experts: {format_experts(experts)}", highlight=False)


def _table(report: CalibrationReport) -> Table:
    plan = report.statistics.plan
    table = Table(box=box.SIMPLE_HEAD, title="Tokens of each layer's experts")
    table.caption = (
        f"{report.tokens:,} tokens to {plan.top_k} of {plan.num_experts} experts each, in {report.seconds:.1f} s "
        f"({report.tokens / report.seconds:,.0f} tokens/s); {report.bytes / 1e6:,.1f} MB of statistics"
    )
    for name in ("layer", "fewest", "mean", "most", "most / mean", "never reached"):
        table.add_column(name, justify="right")
    for load in report.loads:
        table.add_row(*_cells(load))
    return table


def _cells(load: LayerLoad) -> Iterable[str]:
    yield str(load.layer)
    yield f"{load.fewest:,}"
    yield f"{load.mean:,.0f}"
    yield f"{load.most:,}"
    yield f"{load.most / load.mean:.2f}"
    yield str(len(load.unreached)) if load.unreached else "-"


def _load(statistics: Statistics, layer: int) -> LayerLoad:
    count = statistics.counts(layer)
    unreached = tuple((count == 0).nonzero()[:, 0].tolist())
    return LayerLoad(layer, int(count.min()), float(count.double().mean()), int(count.max()), unreached)
