"""`flyray bench kernels`: what every kernel reaches of this machine's ceilings, in a model's shapes."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from rich.table import Table

from ...actors.model.config import ModelConfig
from ...kernels.cpu.backend import CpuKernels
from ...kernels.cpu.library import LibraryError
from ..figures import Figure
from ..synthesize import Synthesis
from .kernel_cases import KernelCase, KernelCases
from .machine import Machine, bf16_peak, int8_peak, read_bandwidth, this_machine
from .plot import Panel
from .rounds import BenchUsageError

# A sample is at least so long, so that the clock and one wake-up of the threads do not count.
_SAMPLE_S = 0.004


@dataclass(frozen=True)
class KernelSettings:
    """model: a shipped shape or a config.json. only: patterns of cases' names. context: tokens in the cache before
    what decodes. variants: of the CPU library, "" for the best. runs: samples of each, in turns."""

    model: str
    tokens: tuple[int, ...]
    threads: int = 2
    context: int = 256
    variants: tuple[str, ...] = ("",)
    only: tuple[str, ...] = ("*",)
    runs: int = 7


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run. read: bytes a second. int8, bf16: operations a second of a large product."""

    read: float
    int8: float
    bf16: float

    def floor(self, case: KernelCase) -> float:
        """Least seconds of a call."""
        return max(case.bytes / self.read, case.operations / (self.int8 if case.integer else self.bf16))


@dataclass(frozen=True)
class KernelTime:
    """seconds: of a call, a value a round. disturbed: every round had an involuntary context switch, so that none
    could be dropped."""

    case: KernelCase
    variant: str
    seconds: tuple[float, ...]
    disturbed: bool

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class KernelBench:
    """What was measured."""

    settings: KernelSettings
    machine: Machine
    ceilings: Ceilings
    times: tuple[KernelTime, ...]

    def figures(self) -> list[Figure]:
        """kernel_us.CASE.VARIANT (a call's median), kernel_us_low (its least), kernel_gb_s, kernel_top_s, and
        kernel_share of the ceiling that binds; read_bandwidth, int8_peak, bf16_peak."""
        found = [
            Figure("read_bandwidth", self.ceilings.read, "bytes/s"),
            Figure("int8_peak", self.ceilings.int8, "operations/s"),
            Figure("bf16_peak", self.ceilings.bf16, "operations/s"),
            Figure("threads", self.settings.threads, "1"),
        ]
        for each in self.times:
            at, seconds = f"{each.case.name}.{each.variant}", each.median
            found.append(Figure(f"kernel_us.{at}", 1e6 * seconds, "microseconds"))
            found.append(Figure(f"kernel_us_low.{at}", 1e6 * min(each.seconds), "microseconds"))
            found.append(Figure(f"kernel_gb_s.{at}", each.case.bytes / seconds / 1e9, "GB/s"))
            found.append(Figure(f"kernel_top_s.{at}", each.case.operations / seconds / 1e12, "TOP/s"))
            found.append(Figure(f"kernel_share.{at}", self.ceilings.floor(each.case) / seconds, "1"))
        return found

    def table(self) -> Table:
        """The figures for people."""
        table = Table(title=f"{self.settings.model}: median of up to {self.settings.runs} samples")
        for column in ("kernel", "variant", "µs a call", "least", "most", "GB/s", "TOP/s", "of ceiling", "bound by"):
            left = column in ("kernel", "variant", "bound by")
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for each in self.times:
            case, seconds = each.case, each.median
            bound = "memory" if self.ceilings.floor(case) == case.bytes / self.ceilings.read else "arithmetic"
            table.add_row(
                case.name,
                each.variant,
                f"{1e6 * seconds:,.1f}" + ("*" if each.disturbed else ""),
                f"{1e6 * min(each.seconds):,.1f}",
                f"{1e6 * max(each.seconds):,.1f}",
                f"{case.bytes / seconds / 1e9:.1f}",
                f"{case.operations / seconds / 1e12:.3f}",
                f"{self.ceilings.floor(case) / seconds:.0%}",
                bound,
            )
        return table

    def remarks(self) -> list[str]:
        """What the numbers were taken on, a line each."""
        ceilings = self.ceilings
        read, int8, bf16 = ceilings.read / 1e9, ceilings.int8 / 1e12, ceilings.bf16 / 1e12
        lines = [
            f"{self.machine}; {self.settings.threads} threads",
            f"ceilings, measured in this run: read {read:.1f} GB/s, products INT8 {int8:.2f}, bf16 {bf16:.2f} TOP/s",
            "above 100 %: its data lie in a cache",
        ]
        if any(each.disturbed for each in self.times):
            lines.append("* no sample without an involuntary context switch: the machine was busy")
        return lines

    def panels(self) -> list[Panel]:
        """Shares of the ceilings, a panel a number of tokens."""
        panels: dict[str, dict[str, list[float]]] = {}
        for each in self.times:
            kernel, _, tokens = each.case.name.rpartition(".t")
            name = kernel if len(self.settings.variants) == 1 else f"{kernel} {each.variant}"
            shares = [100 * self.ceilings.floor(each.case) / seconds for seconds in each.seconds]
            panels.setdefault(tokens, {})[name] = shares
        return [Panel(f"{tokens} tokens", "% of the ceiling", values, {}) for tokens, values in panels.items()]


def bench_kernels(settings: KernelSettings, say: Callable[[str], None]) -> KernelBench:
    """Measures in this process. Raises BenchUsageError when no case has a name that was asked for or this CPU has not
    a variant, SynthesizeError for an unknown model."""
    config = ModelConfig.from_dict(Synthesis(settings.model).config())
    with _kernels(settings) as variants, torch.inference_mode():
        cases = list(KernelCases(config, settings.context, settings.only).cases(settings.tokens))
        if not cases:
            raise BenchUsageError(f"only: no kernel is called {', '.join(settings.only)}; experts_w4a8.t8 is one")
        before = _ceilings(settings.threads)
        samples: dict[tuple[str, str], list[tuple[float, bool]]] = {}
        for run in range(settings.runs + 1):
            for case in cases:
                for kernels in variants:
                    sample = _sample(case, kernels)
                    if run:  # the first one touches memory and is not counted
                        samples.setdefault((case.name, kernels.variant), []).append(sample)
            say(f"round {run} of {settings.runs}" + ("" if run else " (not counted)"))
        names = [kernels.variant for kernels in variants]
    after = _ceilings(settings.threads)
    ceilings = Ceilings(max(before.read, after.read), max(before.int8, after.int8), max(before.bf16, after.bf16))
    times = tuple(_time(case, name, samples[case.name, name]) for case in cases for name in names)
    return KernelBench(settings, this_machine(), ceilings, times)


@contextmanager
def _kernels(settings: KernelSettings) -> Iterator[list[CpuKernels]]:
    with ExitStack() as stack:
        found = []
        for variant in settings.variants:
            try:
                found.append(CpuKernels(settings.threads, variant))
            except LibraryError as error:
                raise BenchUsageError(f"variant: {error}") from None
            stack.callback(found[-1].close)
        yield found


def _ceilings(threads: int) -> Ceilings:
    return Ceilings(read_bandwidth(threads), int8_peak(threads), bf16_peak(threads))


def _sample(case: KernelCase, kernels: CpuKernels) -> tuple[float, bool]:
    """Seconds of a call, each copy of the weights in turn, and whether an involuntary context switch came between."""
    calls, switches = 0, _switches()
    begin = time.perf_counter()
    while (now := time.perf_counter()) - begin < _SAMPLE_S or not calls:
        for call in case.calls:
            call(kernels)
        calls += len(case.calls)
        now = time.perf_counter()
    return (now - begin) / calls, _switches() > switches


def _switches() -> int:
    """Involuntary context switches of this process, all threads together."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _time(case: KernelCase, variant: str, samples: Sequence[tuple[float, bool]]) -> KernelTime:
    """Without the samples that were disturbed, unless all were."""
    quiet = tuple(seconds for seconds, disturbed in samples if not disturbed)
    return KernelTime(case, variant, quiet or tuple(seconds for seconds, _ in samples), not quiet)
