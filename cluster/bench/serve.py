"""`flyray bench serve`: load on a server, or on the demo's, and beside it on its engine without HTTP."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from ..config import FlyrayConfig
from ..engine_state import EngineAddress
from ..figures import Figure
from ..http_chat import HttpChat
from ..stop_signals import StopSignals
from .load import Level, LoadError, LoadProcess, LoadTask, Measured, Workload
from .load_summary import PERCENTILES, Limits, LoadSummary, PrefixReuse, Spread, StreamTimes
from .plot import Panel, write_plot

_WARM_UP_S = 1.0
_SPREADS = ("ttft", "tpot", "itl")


@dataclass(frozen=True)
class ServeSettings:
    """levels: run one after another, each `runs` times; against_engine: in turns with the engine itself.
    api_key: what the server asks for, "" for none."""

    levels: tuple[Level, ...]
    workload: Workload
    runs: int
    limits: Limits
    against_engine: bool = False
    api_key: str = ""

    def __post_init__(self) -> None:
        if self.against_engine and self.workload.endpoint != "completions":
            raise LoadError("an engine takes token ids: measure against it with the endpoint 'completions'")


@dataclass(frozen=True)
class LevelResult:
    """A level. summary: rates are medians of the runs, spreads are of all answers; runs: each run's tokens a second.

    engine: the same of the engine without HTTP, and share: the median of HTTP's rate over it; None if not measured.
    reuse: with a shared prefix.
    """

    level: Level
    summary: LoadSummary
    runs: tuple[float, ...]
    engine: LoadSummary | None = None
    share: float | None = None
    reuse: PrefixReuse | None = None

    def figures(self) -> list[Figure]:
        """serve_tok_s.LEVEL, serve_req_s, goodput, errors, {ttft,tpot,itl}.{p50,p90,p99}.LEVEL, http_share.LEVEL,
        prefix_{ttft_first,ttft_later,cached_share,computed}.LEVEL."""
        name, found = self.level.name, self.summary
        figures = [
            Figure(f"serve_tok_s.{name}", found.tokens_per_second, "tokens/s"),
            Figure(f"serve_req_s.{name}", found.requests_per_second, "requests/s"),
            Figure(f"goodput.{name}", found.goodput, "requests/s"),
            Figure(f"serve_errors.{name}", sum(found.errors.values()), "1"),
        ]
        for kind in _SPREADS:
            spread: Spread = getattr(found, kind)
            if not math.isnan(spread.mean):  # answers of one token have no time between tokens
                figures += [Figure(f"{kind}.p{p}.{name}", getattr(spread, f"p{p}"), "seconds") for p in PERCENTILES]
        if self.engine is not None and self.share is not None:
            figures.append(Figure(f"engine_tok_s.{name}", self.engine.tokens_per_second, "tokens/s"))
            figures.append(Figure(f"engine_ttft.p50.{name}", self.engine.ttft.p50, "seconds"))
            figures.append(Figure(f"http_share.{name}", self.share, "1"))
        if self.reuse is not None:
            figures.append(Figure(f"prefix_ttft_first.{name}", self.reuse.first, "seconds"))
            if not math.isnan(self.reuse.later):
                figures.append(Figure(f"prefix_ttft_later.{name}", self.reuse.later, "seconds"))
            figures.append(Figure(f"prefix_cached_share.{name}", self.reuse.cached_share, "1"))
            figures.append(Figure(f"prefix_computed.{name}", self.reuse.computed, "1"))
        return figures

    def rows(self) -> dict[str, str]:
        """The figures for people; times in milliseconds."""
        found = self.summary
        rows = {
            "tokens/s": f"{found.tokens_per_second:,.0f}",
            "requests/s": f"{found.requests_per_second:.1f}",
            "goodput/s": f"{found.goodput:.1f}",
            "errors": str(sum(found.errors.values())),
        }
        rows |= {f"{kind.upper()}, ms": _milliseconds(getattr(found, kind)) for kind in _SPREADS}
        if self.engine is not None and self.share is not None:
            rows["engine tokens/s"] = f"{self.engine.tokens_per_second:,.0f}"
            rows["engine TTFT, ms"] = _milliseconds(self.engine.ttft)
            rows["share of engine"] = f"{self.share:.1%}"
        if self.reuse is not None:
            rows["TTFT of a run's first, ms"] = f"{self.reuse.first * 1000:.1f}"
            rows["TTFT of the others, ms"] = f"{self.reuse.later * 1000:.1f}"
            rows["prompt tokens from the cache"] = f"{self.reuse.cached_share:.1%}"
            rows["computed / least"] = f"{self.reuse.computed:.3f}"
        return rows


@dataclass(frozen=True)
class ServeBench:
    """What was measured at each level."""

    settings: ServeSettings
    results: tuple[LevelResult, ...]

    def figures(self) -> list[Figure]:
        return [figure for result in self.results for figure in result.figures()]

    def table(self) -> Table:
        """A column a level."""
        work, limits = self.settings.workload, self.settings.limits
        prompts = f"{work.shared_prefix} shared + {work.prompt_tokens}" if work.shared_prefix else work.prompt_tokens
        table = Table(title=f"{work.endpoint}: prompts of {prompts}, answers of {work.max_tokens} tokens")
        table.add_column("p50 / p90 / p99")
        for result in self.results:
            table.add_column(result.level.name, justify="right")
        columns = [result.rows() for result in self.results]
        for name in columns[0]:
            table.add_row(name, *(column[name] for column in columns))
        good = f"{_limit('TTFT', limits.ttft)} and {_limit('TPOT', limits.tpot)}"
        reasons = sorted({reason for result in self.results for reason in result.summary.errors})
        table.caption = f"goodput: answers with {good}" + "".join(f"\nerror: {reason}" for reason in reasons)
        return table

    def plot(self, path: Path) -> None:
        """Tokens a second and times to the first token by level, as a PNG."""
        times = {
            result.level.name: [getattr(result.summary.ttft, f"p{p}") * 1000 for p in PERCENTILES]
            for result in self.results
        }
        panels = [
            Panel("throughput", "tokens/s", {result.level.name: result.runs for result in self.results}, {}),
            Panel("time to first token: p50, p90, p99", "ms", times, {}),
        ]
        write_plot(path, f"flyray bench serve, {self.settings.workload.endpoint}", panels)


def bench_url(url: str, settings: ServeSettings) -> ServeBench:
    """Loads a running server. Raises LoadError, and ChatClientError for what is no server."""
    if settings.against_engine:
        raise LoadError("the engine behind a URL cannot be reached: measure against it with --demo or --config")
    with ExitStack() as stack:
        chat = stack.enter_context(HttpChat(url, settings.api_key))
        base = url.rstrip("/").removesuffix("/v1")
        settings = replace(settings, workload=replace(settings.workload, model=settings.workload.model or chat.model()))
        return _bench(stack.enter_context(LoadProcess()), base, None, settings)


def bench_config(
    config: FlyrayConfig, settings: ServeSettings, *, say: Callable[[str], None] = print, keep_logs: bool = False
) -> ServeBench:
    """Starts a server, loads it, and ends it, also when a signal asks to end, which raises Stopped.

    Raises LoadError, and what `Server` raises.
    """
    from ..serve import Server

    settings = replace(settings, workload=replace(settings.workload, model=config.model_name))
    server = Server(config, say=say, keep_logs=keep_logs)
    with StopSignals(server.end_now) as signals:
        try:
            server.start(signals.arm)
            address = server.engine_address if settings.against_engine else None
            with LoadProcess() as load:
                return _bench(load, server.url, address, settings)
        finally:
            signals.closing()
            server.stop()


def _bench(
    load: Callable[[LoadTask], Measured], url: str, address: EngineAddress | None, settings: ServeSettings
) -> ServeBench:
    first = 0
    results: list[LevelResult] = []
    for level in settings.levels:
        http: list[Measured] = []
        engine: list[Measured] = []
        warm = replace(level, seconds=_WARM_UP_S)
        for seconds in [warm] + [level] * settings.runs:
            for measured, where in ((http, None), (engine, address)):
                if measured is engine and address is None:
                    continue
                task = LoadTask(settings.workload, seconds, first, url, where, settings.api_key)
                measured.append(load(task))
                first += len(measured[-1].streams)
        results.append(_result(level, http[1:], engine[1:], settings.limits, settings.workload.shared_prefix))
    return ServeBench(settings, tuple(results))


def _result(
    level: Level, http: Sequence[Measured], engine: Sequence[Measured], limits: Limits, prefix: int
) -> LevelResult:
    summaries = [LoadSummary.of(each.streams, each.begin, each.end, limits) for each in http]
    whole = _together(http, summaries, limits)
    runs = tuple(summary.tokens_per_second for summary in summaries)
    if not whole.requests:
        raise LoadError(f"{level.name}: no request was answered: {whole.errors}")
    reuse = PrefixReuse.of([each.streams for each in http], prefix) if prefix else None
    if not engine:
        return LevelResult(level, whole, runs, reuse=reuse)
    own = [LoadSummary.of(each.streams, each.begin, each.end, limits) for each in engine]
    if not all(each.tokens_per_second for each in own):
        raise LoadError(f"{level.name}: the engine itself answered nothing: {own[0].errors}")
    share = statistics.median(
        mine.tokens_per_second / theirs.tokens_per_second for mine, theirs in zip(summaries, own, strict=True)
    )
    return LevelResult(level, whole, runs, _together(engine, own, limits), share, reuse)


def _together(runs: Sequence[Measured], summaries: Sequence[LoadSummary], limits: Limits) -> LoadSummary:
    """Rates are medians of the runs, spreads are of all their answers."""
    streams: list[StreamTimes] = [stream for run in runs for stream in run.streams]
    whole = LoadSummary.of(streams, runs[0].begin, runs[-1].end, limits)
    return replace(
        whole,
        seconds=sum(each.seconds for each in summaries),
        tokens_per_second=statistics.median(each.tokens_per_second for each in summaries),
        requests_per_second=statistics.median(each.requests_per_second for each in summaries),
        goodput=statistics.median(each.goodput for each in summaries),
    )


def _milliseconds(spread: Spread) -> str:
    return " / ".join(f"{value * 1000:.1f}" for value in (spread.p50, spread.p90, spread.p99))


def _limit(name: str, seconds: float | None) -> str:
    return f"any {name}" if seconds is None else f"{name} up to {seconds * 1000:g} ms"
