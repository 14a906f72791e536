"""What /cluster and /cluster/trace say, and that a trace nobody waits for any more is not asked for twice."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np

from flyray.actors.expert_state import EVEN_LOAD, ExpertState, load_bytes
from flyray.actors.request import EngineStatus, TracedStep
from flyray.actors.step_plan import StageTime
from flyray.cluster.front import cluster_view
from flyray.cluster.front.cluster_view import TRACED_STEPS, ClusterView, step_bodies
from flyray.cluster.front.errors import EngineUnavailable
from flyray.cluster.front.metrics import FrontMetrics

EXPERTS = ExpertState(imbalance=1.5, moved=3, version=2, layers=(1, 2), loads=b"\x00\x20\x40\xff")
STATUS = EngineStatus(
    "q", "e0", 4, True, "", 2, 3, 5, 10, 64, 7, 1, 4096, ("a line",), (), 20, 1, 100, 40, experts=EXPERTS
)
TRACE = (TracedStep(9, 0, (StageTime("embed", 5_000, 7_500),)), TracedStep(9, 1, (StageTime("embed", 90_000, 91_000),)))


class Engine:
    """Answers at once; a trace only when `traced` is set."""

    def __init__(self, status: EngineStatus | None) -> None:
        self.answer, self.asked, self.traced = status, 0, asyncio.Event()

    async def status(self, trace_steps: int = 0) -> EngineStatus:
        if self.answer is None:
            raise EngineUnavailable("the engine is starting")
        if trace_steps:
            assert trace_steps == TRACED_STEPS
            self.asked += 1
            await self.traced.wait()
        return self.answer


def body(response: Any) -> dict[str, Any]:
    return json.loads(response.body)


async def cluster_of(view: ClusterView) -> dict[str, Any]:
    return body(await view.cluster())


def ask(engine: Engine) -> dict[str, Any]:
    return asyncio.run(cluster_of(ClusterView(engine, "m", FrontMetrics("m", "f"))))


def test_an_engine_at_work():
    told = ask(Engine(STATUS))
    assert (told["version"], told["model"]) == (1, "m")
    assert told["front"].pop("seconds") >= 0
    assert told["front"] == {"name": "f", "prompt_tokens": 0, "generated_tokens": 0, "finished": {}}
    (engine,) = told["engines"]
    assert engine["experts"].pop("loads") == "ACBA/w=="
    assert engine == {
        "name": "e0",
        "state": "ready",
        "error": "",
        "epoch": 4,
        "shards": 2,
        "context_length": 4096,
        "running": 3,
        "waiting": 5,
        "pages": {"total": 64, "free": 10, "cached": 20},
        "steps": 7,
        "preemptions": 1,
        "dropped_messages": 1,
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "experts": {"imbalance": 1.5, "moved": 3, "changes": 2, "failures": 0, "layers": [1, 2]},
        "precision_plan": ["a line"],
    }


def test_no_engine_is_told_with_its_reason():
    told = ask(Engine(None))
    assert told["engines"] == [{"name": "", "state": "unavailable", "error": "the engine is starting"}]


def test_times_of_a_trace_begin_with_each_shards_first():
    assert step_bodies(TRACE) == [
        {"step": 9, "shard": 0, "stages": [["embed", 0.0, 2.5]]},
        {"step": 9, "shard": 1, "stages": [["embed", 0.0, 1.0]]},
    ]


def test_an_idle_engine_is_asked_for_one_trace_whoever_comes_and_goes(monkeypatch):
    async def main() -> None:
        engine = Engine(STATUS)
        view = ClusterView(engine, "m", FrontMetrics("m", "f"))
        monkeypatch.setattr(cluster_view, "_TRACE_TIMEOUT_S", 0.0)
        for _ in range(3):
            idle = await view.trace()
            assert idle.status_code == 504
            assert body(idle)["error"]["code"] == "no_steps"
        assert engine.asked == 1
        monkeypatch.setattr(cluster_view, "_TRACE_TIMEOUT_S", 100.0)
        engine.traced.set()
        assert body(await view.trace()) == {"version": 1, "engines": [{"name": "e0", "steps": []}]}
        await view.trace()
        assert engine.asked == 2
        engine.answer = None
        assert (await view.trace()).status_code == 503

    asyncio.run(main())


def test_load_bytes_are_32nds_of_an_even_share():
    shares = np.array([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.01, 0.49, 0.25, 0.25]])
    loads = np.frombuffer(load_bytes(shares), np.uint8).reshape(shares.shape)
    assert loads[0].tolist() == [EVEN_LOAD] * 4
    assert loads[1].tolist() == [0, 4 * EVEN_LOAD, 0, 0]
    assert loads[2].tolist() == [1, 63, 32, 32]
    assert max(load_bytes(np.eye(20))) == 255
