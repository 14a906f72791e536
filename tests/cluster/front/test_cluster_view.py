"""What /cluster and /cluster/trace say, and that a trace nobody waits for any more is not asked for twice."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np

from flyray.actors.expert_state import EVEN_LOAD, ExpertState, load_bytes
from flyray.actors.request import EngineStatus, TracedStep
from flyray.actors.step_plan import StageTime
from flyray.cluster.engine_client import EngineUnreachable
from flyray.cluster.front import cluster_view
from flyray.cluster.front.cluster_view import TRACED_STEPS, ClusterView, step_bodies
from flyray.cluster.front.engine_view import EngineView
from flyray.cluster.front.metrics import FrontMetrics

EXPERTS = ExpertState(imbalance=1.5, moved=3, version=2, layers=(1, 2), loads=b"\x00\x20\x40\xff")
STATUS = EngineStatus(
    "q", "e0", 4, True, "", 2, 3, 5, 10, 64, 7, 1, 4096, ("a line",), (), 20, 1, 100, 40, experts=EXPERTS, recoveries=6
)
TRACE = (TracedStep(9, 0, (StageTime("embed", 5_000, 7_500),)), TracedStep(9, 1, (StageTime("embed", 90_000, 91_000),)))


class Engines:
    """Those of some views; a trace comes when `traced` is set."""

    def __init__(self, *views: EngineView) -> None:
        self.all, self.asked, self.traced = list(views), 0, asyncio.Event()

    async def views(self) -> list[EngineView]:
        return self.all

    async def trace(self, engine: str, steps: int) -> EngineStatus:
        assert steps == TRACED_STEPS
        self.asked += 1
        await self.traced.wait()
        for view in self.all:
            if view.name == engine and view.status is not None:
                return view.status
        raise EngineUnreachable("it went")


def body(response: Any) -> dict[str, Any]:
    return json.loads(response.body)


def ask(*views: EngineView) -> dict[str, Any]:
    async def main() -> Any:
        return await ClusterView(Engines(*views), "m", FrontMetrics("m", "f")).cluster()

    return body(asyncio.run(main()))


def test_an_engine_at_work():
    told = ask(EngineView("e0", "ready", "", STATUS))
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
        "recoveries": 6,
        "dropped_messages": 1,
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "experts": {"imbalance": 1.5, "moved": 3, "changes": 2, "failures": 0, "layers": [1, 2]},
        "precision_plan": ["a line"],
    }


def test_engines_that_tell_nothing_have_their_reasons():
    told = ask(EngineView("e1", "lost", "no answer", None), EngineView("e2", "starting", "", None))
    assert told["engines"] == [
        {"name": "e1", "state": "lost", "error": "no answer"},
        {"name": "e2", "state": "starting", "error": ""},
    ]
    assert ask()["engines"] == []


def test_times_of_a_trace_begin_with_each_shards_first():
    assert step_bodies(TRACE) == [
        {"step": 9, "shard": 0, "stages": [["embed", 0.0, 2.5]]},
        {"step": 9, "shard": 1, "stages": [["embed", 0.0, 1.0]]},
    ]


def test_an_idle_engine_is_asked_for_one_trace_whoever_comes_and_goes(monkeypatch):
    async def main() -> None:
        engines = Engines(EngineView("e0", "ready", "", replace(STATUS, trace=TRACE)))
        view = ClusterView(engines, "m", FrontMetrics("m", "f"))
        monkeypatch.setattr(cluster_view, "_TRACE_TIMEOUT_S", 0.0)
        for _ in range(3):
            idle = await view.trace("e0")
            assert idle.status_code == 504
            assert body(idle)["error"]["code"] == "no_steps"
        monkeypatch.setattr(cluster_view, "_TRACE_TIMEOUT_S", 100.0)
        engines.traced.set()
        assert body(await view.trace("e0")) == {"version": 1, "name": "e0", "steps": step_bodies(TRACE)}
        assert engines.asked == 1
        await view.trace("e0")
        assert engines.asked == 2
        assert (await view.trace("e1")).status_code == 503

    asyncio.run(main())


def test_load_bytes_are_32nds_of_an_even_share():
    shares = np.array([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.01, 0.49, 0.25, 0.25]])
    loads = np.frombuffer(load_bytes(shares), np.uint8).reshape(shares.shape)
    assert loads[0].tolist() == [EVEN_LOAD] * 4
    assert loads[1].tolist() == [0, 4 * EVEN_LOAD, 0, 0]
    assert loads[2].tolist() == [1, 63, 32, 32]
    assert max(load_bytes(np.eye(20))) == 255
