"""What `flyray bench engine` found: figures, the table for people, and what a plot needs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from ..figures import Figure
from .machine import Machine
from .plot import Panel
from .rounds import Round, Sizes


@dataclass(frozen=True)
class Spreading:
    """Of one format's decode steps at one batch size. touched: distinct experts a layer, of `experts`. step_bytes: that
    a step must read. floor: tokens a second if that is all it does, at the bandwidth measured."""

    touched: float
    experts: int
    step_bytes: int
    floor: float


@dataclass(frozen=True)
class Measure:
    """One number of every variant, a value a round. title: what it is; key: its figure's name without the variant."""

    title: str
    key: str
    unit: str
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class EngineBench:
    """rounds: of every variant, a format or a peer. bandwidth: bytes a second read from memory, measured in the same
    run. spreading: by format and batch. linears: of every format, the bits of weights beside the routed experts."""

    model: str
    machine: Machine
    shards: int
    threads: int
    sizes: Sizes
    rounds: Mapping[str, Sequence[Round]]
    bandwidth: float
    spreading: Mapping[tuple[str, int], Spreading]
    linears: Mapping[str, str]

    def measures(self) -> Iterator[Measure]:
        """Rates, by batch and of prefill."""
        for batch in self.sizes.batches:
            values = {name: [each.decode[batch] for each in rounds] for name, rounds in self.rounds.items()}
            yield Measure(f"decode, batch {batch}", f"decode_tok_s.b{batch}", "tokens/s", values)
        values = {name: [each.prefill for each in rounds] for name, rounds in self.rounds.items()}
        yield Measure(f"prefill {self.sizes.prefill}", f"prefill_tok_s.{self.sizes.prefill}", "tokens/s", values)

    def figures(self) -> list[Figure]:
        """Medians: decode_tok_s.bBATCH.VARIANT, prefill_tok_s.TOKENS.VARIANT, each with NAME_low and NAME_high;
        decode_step_ms.bBATCH.FORMAT, decode_floor_tok_s, decode_share and experts_touched likewise; read_bandwidth."""
        found = [
            Figure("read_bandwidth", self.bandwidth, "bytes/s"),
            Figure("threads", self.shards * self.threads, "1"),
            Figure("runs", len(next(iter(self.rounds.values()))), "1"),
        ]
        for measure in self.measures():
            name, _, size = measure.key.partition(".")
            for variant, values in measure.values.items():
                found.append(Figure(f"{name}.{size}.{variant}", statistics.median(values), measure.unit))
                found.append(Figure(f"{name}_low.{size}.{variant}", min(values), measure.unit))
                found.append(Figure(f"{name}_high.{size}.{variant}", max(values), measure.unit))
        for (format, batch), each in self.spreading.items():
            at = f"b{batch}.{format}"
            found.append(Figure(f"decode_step_ms.{at}", self.step_ms(format, batch), "ms"))
            found.append(Figure(f"decode_floor_tok_s.{at}", each.floor, "tokens/s"))
            found.append(Figure(f"decode_share.{at}", self.share(format, batch), "1"))
            found.append(Figure(f"experts_touched.{at}", each.touched, "1"))
        return found

    def step_ms(self, format: str, batch: int) -> float:
        """Median of the rounds' median milliseconds of a decode step."""
        return statistics.median(each.step_ms[batch] for each in self.rounds[format])

    def share(self, format: str, batch: int) -> float:
        """The decode rate over its floor: what part of the memory's bandwidth the weights alone take."""
        return statistics.median(each.decode[batch] for each in self.rounds[format]) / (
            self.spreading[format, batch].floor
        )

    def table(self) -> Table:
        """The figures for people: median (least to most) of the rounds."""
        runs = len(next(iter(self.rounds.values())))
        table = Table(title=f"{self.model}: tokens a second, median (least to most) of {runs} rounds in turns")
        table.add_column("")
        for measure in self.measures():
            table.add_column(measure.title, justify="right")
        for variant in self.rounds:
            table.add_row(variant, *(_cell(measure.values[variant]) for measure in self.measures()))
            if (variant, self.sizes.batches[0]) in self.spreading:
                table.add_row("  of its floor", *self._shares(variant), "", style="dim")
                table.add_row("  ms a step", *self._steps(variant), "", style="dim")
                table.add_row("  experts touched", *self._touched(variant), "", style="dim")
        return table

    @property
    def title(self) -> str:
        return f"{self.model} on {self.machine.cpu}, {self.shards * self.threads} threads"

    def panels(self) -> list[Panel]:
        """What a plot shows: rates, with the floors of decoding."""
        found = []
        for batch, measure in zip((*self.sizes.batches, 0), self.measures(), strict=True):
            floors = {name: each.floor for (name, size), each in self.spreading.items() if size == batch}
            found.append(Panel(measure.title, measure.unit, measure.values, floors))
        return found

    def remarks(self) -> list[str]:
        """What the numbers were taken on, a line each."""
        threads, sizes = self.shards * self.threads, self.sizes
        read = f"{self.bandwidth / 1e9:.1f} GB/s"
        return [
            f"{self.machine}; {self.shards} shards of {self.threads} threads",
            *(f"{format}: weights beside the routed experts: {bits}" for format, bits in self.linears.items()),
            f"floor: the bytes of a step, at the {read} that {threads} threads read from memory in the same run",
            f"decode: {sizes.decode} tokens each after random prompts of {sizes.prefill}, while all of the batch run",
            "experts touched: distinct ones a layer and step",
        ]

    def _shares(self, format: str) -> list[str]:
        return [
            f"{self.share(format, batch):.0%} of {self.spreading[format, batch].floor:.0f}"
            for batch in self.sizes.batches
        ]

    def _steps(self, format: str) -> list[str]:
        return [f"{self.step_ms(format, batch):.2f}" for batch in self.sizes.batches]

    def _touched(self, format: str) -> list[str]:
        found = [self.spreading[format, batch] for batch in self.sizes.batches]
        return [f"{each.touched:.1f} of {each.experts}" for each in found]


def _cell(values: Sequence[float]) -> str:
    """Three digits or whole tokens."""
    median, low, high = statistics.median(values), min(values), max(values)
    digits = 0 if median >= 100 else 1
    spread = f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else ""
    return f"{median:.{digits}f}{spread}"
