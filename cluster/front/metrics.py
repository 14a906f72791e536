"""GET /metrics: what a front's clients met, and its engine's state, under the names of vLLM's dashboards.

The times and request counts are of one front alone, told apart by the label `front`; sum over it. What the engine
tells (`num_requests_…`, caches, preemptions, steps) every front tells alike; take the maximum over fronts, and sum
over the label `engine`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from itertools import chain
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...actors.expert_state import ExpertState
from ...actors.request import EngineStatus, Generate, Progress
from ..chat import TokenSource
from .engine_view import STAGES, EngineView
from .histogram import Histogram

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Bounds in seconds, those of vLLM's own histograms, so that its dashboards fit; finer where a CPU's small models are.
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_E2E = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
# A request that its client left or that failed has no reason of vLLM's other than this.
_ABORT = "abort"


class FrontMetrics:
    """What this front's requests met. Used from one event loop."""

    def __init__(self, model_name: str, front: str) -> None:
        """front: tells this process from the other fronts."""
        self._model, self._front = model_name, front
        self._ttft = Histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT
        )
        self._itl = Histogram("vllm:inter_token_latency_seconds", "From a token to the next.", _ITL)
        self._e2e = Histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", _E2E)
        self._finished: dict[str, int] = {}
        self._prompt_tokens = 0
        self._tokens = 0
        self._replays = 0

    def replayed(self) -> None:
        """A request was sent on to another engine."""
        self._replays += 1

    async def watch(self, source: TokenSource, request: Generate) -> AsyncGenerator[Progress, None]:
        """What `source` gives to the request, timed."""
        begin = last = time.perf_counter()
        reason, first = _ABORT, True
        self._prompt_tokens += len(request.prompt)
        try:
            async with aclosing(source.generate(request)) as news:
                async for progress in news:
                    count = len(progress.tokens)
                    if count:
                        now = time.perf_counter()
                        if first:
                            self._ttft.add(now - begin)
                        if count > first:
                            self._itl.add((now - last) / count, count - first)
                        self._tokens += count
                        last, first = now, False
                    if progress.finish:
                        reason = _ABORT if progress.finish == "error" else progress.finish
                    yield progress
        finally:
            self._e2e.add(time.perf_counter() - begin)
            self._finished[reason] = self._finished.get(reason, 0) + 1

    def text(self, engines: Sequence[EngineView], others: Sequence[FrontMetrics] = ()) -> bytes:
        """All of it in Prometheus' format, `others` beside it, also when there is no engine."""
        families: dict[str, Metric] = {}
        for family in chain.from_iterable(each._own() for each in (self, *others)):
            first = families.setdefault(family.name, family)
            if first is not family:
                first.samples += family.samples
        return generate_latest(_Families([*families.values(), *self._of_engines(engines)]))

    def totals(self) -> dict[str, Any]:
        """What this front has counted since its start, for `ClusterView`."""
        return {
            "name": self._front,
            "prompt_tokens": self._prompt_tokens,
            "generated_tokens": self._tokens,
            "finished": dict(self._finished),
        }

    def _own(self) -> Iterator[Metric]:
        labels = {"model_name": self._model, "front": self._front}
        for histogram in (self._ttft, self._itl, self._e2e):
            yield histogram.family(labels)
        yield _counter("vllm:prompt_tokens", "Prompt tokens that were asked for.", labels, self._prompt_tokens)
        yield _counter("vllm:generation_tokens", "Tokens generated.", labels, self._tokens)
        yield _counter("flyray:replays", "Requests that went on in another engine.", labels, self._replays)
        names = [*labels, "finished_reason"]
        finished = CounterMetricFamily("vllm:request_success", "Requests that ended, by reason.", labels=names)
        for reason, count in sorted(self._finished.items()):
            finished.add_metric([*labels.values(), reason], count)
        yield finished

    def _of_engines(self, engines: Sequence[EngineView]) -> Iterator[Metric]:
        """Each one's families, put together by name."""
        families: dict[str, Metric] = {}
        for engine in engines:
            for family in self._of_engine(engine):
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                families[family.name].samples += family.samples
        return iter(families.values())

    def _of_engine(self, engine: EngineView) -> Iterator[Metric]:
        labels = {"model_name": self._model, "engine": engine.name}
        names = [*labels, "state"]
        states = GaugeMetricFamily("flyray:engine_state", "1 for the state that the engine is in.", labels=names)
        for stage in STAGES:
            states.add_metric([*labels.values(), stage], stage == engine.stage)
        yield states
        yield _gauge("flyray:engine_ready", "Whether the engine takes requests.", labels, engine.stage == "ready")
        if engine.status is not None:
            yield from _of_status(engine.status, labels)


def _of_status(status: EngineStatus, labels: dict[str, str]) -> Iterator[Metric]:
    used = 1 - status.free_pages / status.total_pages if status.total_pages else 0.0
    yield _gauge("vllm:num_requests_running", "Requests in the batch.", labels, status.running)
    yield _gauge("vllm:num_requests_waiting", "Requests that wait to be admitted.", labels, status.waiting)
    yield _gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use; 1 is all.", labels, used)
    help = "Prompt tokens looked for in the prefix cache."
    yield _counter("vllm:prefix_cache_queries", help, labels, status.prompt_tokens)
    yield _counter("vllm:prefix_cache_hits", "Prompt tokens found there.", labels, status.cached_tokens)
    yield _counter("vllm:num_preemptions", "Requests that gave their pages back.", labels, status.preemptions)
    yield _gauge("flyray:cached_pages", "KV pages that the prefix cache holds.", labels, status.cached_pages)
    yield _counter("flyray:steps", "Steps that the engine has run.", labels, status.steps)
    yield _counter("flyray:recoveries", "Times that lost shards came back.", labels, status.recoveries)
    yield from _of_experts(status.experts, labels)
    yield _counter(
        "flyray:dropped_messages", "Messages of other epochs or no meaning.", labels, status.dropped_messages
    )


def _of_experts(experts: ExpertState, labels: dict[str, str]) -> Iterator[Metric]:
    """Of an engine of one shard, or without load yet, counters alone."""
    if experts.imbalance:
        help = "Load of the shard with the most over the mean, in all layers; 1 is even."
        yield _gauge("flyray:expert_imbalance", help, labels, experts.imbalance)
        names = [*labels, "layer", "expert"]
        hottest = GaugeMetricFamily("flyray:expert_share", "Of what a layer's tokens chose; the largest.", labels=names)
        for each in experts.hottest:
            hottest.add_metric([*labels.values(), str(each.layer), str(each.expert)], each.share)
        yield hottest
    yield _counter("flyray:expert_placements", "Changes of a layer's placement.", labels, experts.version)
    yield _counter("flyray:expert_moves", "Slots that got another expert.", labels, experts.moved)
    yield _counter("flyray:expert_move_failures", "Changes that a shard could not read.", labels, experts.failures)
    help = "The longest that a change has kept a shard's step waiting."
    yield _gauge("flyray:expert_switch_seconds", help, labels, experts.longest_switch_s)


class MeteredTokens:
    """A `TokenSource` whose requests are counted."""

    def __init__(self, source: TokenSource, metrics: FrontMetrics) -> None:
        self._source, self._metrics = source, metrics

    def generate(self, request: Generate) -> AsyncGenerator[Progress, None]:
        return self._metrics.watch(self._source, request)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def _gauge(name: str, help: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, help: str, labels: dict[str, str], value: float) -> Metric:
    family = CounterMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
