"""What a front counts: histograms against NumPy, requests as their clients met them, read by Prometheus' own parser."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from flyray.actors.expert_state import ExpertState, HotExpert
from flyray.actors.request import EngineStatus, Generate, Progress
from flyray.actors.step_plan import Sampling
from flyray.cluster.front.engine_view import STAGES, EngineView
from flyray.cluster.front.histogram import Histogram
from flyray.cluster.front.metrics import FrontMetrics, MeteredTokens

LABELS = {"model_name": "m", "front": "f"}
REQUEST = Generate("r", (1, 2, 3), 9, Sampling(0.0, 1.0, 0, 0), (), 0, False)


class Source:
    """Gives every request so many tokens a piece, then this end."""

    def __init__(self, pieces: list[int], finish: str) -> None:
        self._pieces, self._finish = pieces, finish

    async def generate(self, request: Generate) -> AsyncGenerator[Progress, None]:
        for count in self._pieces:
            yield Progress(request.request, (5,) * count, (-0.5,) * count, (), "", "")
        yield Progress(request.request, (), (), (), self._finish, "")


def samples(metrics: FrontMetrics, *engines: EngineView) -> dict[tuple[str, str], float]:
    """Name and finished_reason, bound or layer/expert to value."""
    text = metrics.text(engines).decode()
    return {
        (sample.name, _label(sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _label(labels: dict[str, str]) -> str:
    expert = f"{labels['layer']}/{labels['expert']}" if "expert" in labels else ""
    return labels.get("finished_reason", labels.get("le", expert))


async def drain(source: MeteredTokens, leave_after: int = 1000) -> None:
    async with aclosing(source.generate(REQUEST)) as news:
        async for _ in news:
            leave_after -= 1
            if not leave_after:
                return


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 4))),
    st.lists(st.floats(0.01, 9), min_size=1, unique=True).map(sorted),
)
def test_a_histogram_counts_as_numpy_does(values, bounds):
    histogram = Histogram("h", "Help.", bounds)
    for value, times in values:
        histogram.add(value, times)
    told = {sample.labels.get("le", sample.name): sample.value for sample in histogram.family(LABELS).samples}
    every = np.repeat([value for value, _ in values], [times for _, times in values])
    for bound in bounds:
        assert told[str(bound)] == (every <= bound).sum()
    assert told["+Inf"] == told["h_count"] == len(every)
    np.testing.assert_allclose(told["h_sum"], every.sum(), atol=1e-9)


def test_requests_are_counted_as_they_end():
    metrics = FrontMetrics("m", "f")

    async def run() -> None:
        await drain(MeteredTokens(Source([1, 1, 3], "stop"), metrics))
        await drain(MeteredTokens(Source([2], "length"), metrics))
        await drain(MeteredTokens(Source([], "error"), metrics))
        await drain(MeteredTokens(Source([1, 1, 1], "stop"), metrics), leave_after=2)

    asyncio.run(run())
    told = samples(metrics)
    ended = {reason: value for (name, reason), value in told.items() if name == "vllm:request_success_total"}
    assert ended == {"stop": 1, "length": 1, "abort": 2}
    assert told["vllm:prompt_tokens_total", ""] == 12
    assert told["vllm:generation_tokens_total", ""] == 5 + 2 + 2
    assert told["vllm:time_to_first_token_seconds_count", ""] == 3
    assert told["vllm:inter_token_latency_seconds_count", ""] == 4 + 1 + 1
    assert told["vllm:e2e_request_latency_seconds_count", ""] == 4
    assert "vllm:num_requests_running" not in {name for name, _ in told}


def test_the_engine_is_told_as_it_says():
    experts = ExpertState(1.25, (HotExpert(3, 17, 0.5), HotExpert(1, 2, 0.25)), 4, 9, 1, 0.125)
    status = EngineStatus("q", "e", 0, True, "", 2, 3, 4, 25, 100, 7, 0, 4096, (), (), 11, 12, 13, 14, experts)
    told = samples(FrontMetrics("m", "f"), EngineView("e", "ready", "", status))
    assert told["vllm:num_requests_running", ""] == 3
    assert told["vllm:num_requests_waiting", ""] == 4
    assert told["vllm:kv_cache_usage_perc", ""] == 0.75
    assert told["flyray:cached_pages", ""] == 11
    assert told["vllm:num_preemptions_total", ""] == 12
    assert told["vllm:prefix_cache_queries_total", ""] == 13
    assert told["vllm:prefix_cache_hits_total", ""] == 14
    assert told["flyray:expert_imbalance", ""] == 1.25
    assert told["flyray:expert_share", "3/17"] == 0.5
    assert told["flyray:expert_share", "1/2"] == 0.25
    assert told["flyray:expert_placements_total", ""] == 4
    assert told["flyray:expert_moves_total", ""] == 9
    assert told["flyray:expert_move_failures_total", ""] == 1
    assert told["flyray:expert_switch_seconds", ""] == 0.125
    alone = samples(FrontMetrics("m", "f"), EngineView("e", "ready", "", replace(status, experts=ExpertState())))
    assert ("flyray:expert_imbalance", "") not in alone
    assert alone["flyray:expert_moves_total", ""] == 0


def test_every_engine_tells_for_itself() -> None:
    status = EngineStatus("q", "", 0, True, "", 2, 3, 4, 25, 100, 7, 0, 4096, (), ())
    engines = (
        EngineView("a", "ready", "", status),
        EngineView("b", "draining", "", replace(status, running=5)),
        EngineView("c", "starting", "", None),
    )
    families = {family.name: family for family in text_string_to_metric_families(_text(engines))}
    running = {sample.labels["engine"]: sample.value for sample in families["vllm:num_requests_running"].samples}
    assert running == {"a": 3, "b": 5}
    states = families["flyray:engine_state"].samples
    assert len(states) == len(engines) * len(STAGES)
    assert {(sample.labels["engine"], sample.labels["state"]) for sample in states if sample.value} == {
        ("a", "ready"),
        ("b", "draining"),
        ("c", "starting"),
    }
    ready = {sample.labels["engine"]: sample.value for sample in families["flyray:engine_ready"].samples}
    assert ready == {"a": 1, "b": 0, "c": 0}


def _text(engines: tuple[EngineView, ...]) -> str:
    return FrontMetrics("m", "f").text(engines).decode()
