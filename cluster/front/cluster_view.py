"""GET /cluster and /cluster/trace: what the page shows of the cluster at work, as versioned JSON.

/cluster, at any time with status 200:

    version   1; another number when a field's meaning changes or one goes, not when one comes
    model     its name in requests
    front     of the front that answers, since its start: `name`, `seconds`, `prompt_tokens`, `generated_tokens`, and
              `finished`, reason to number of requests. Behind several fronts each answer is another one's: a rate is
              the difference of two answers of one name, and all together the sum over the names
    engines   a list, in the order of their names: `name`, `state` (one of `engine_view.STAGES`), `error` (why it is not
              ready), and of one that has told any:
        epoch, shards, context_length, precision_plan (lines)
        running, waiting      requests
        pages                 KV pages: `total`, `free` (no request holds them), `cached` (content known, held or free)
        steps, preemptions, recoveries, dropped_messages, prompt_tokens, cached_tokens: since the engine's start
        experts               `imbalance`, `moved`, `changes`, `failures`, and `layers` with `loads`: base64 of a byte
                              for each expert, layer by layer, 32 for an even share of its layer's tokens

/cluster/trace?engine=NAME waits for the engine's next steps and has `version`, `name` and `steps`, each with `step`,
`shard` and `stages` of [name, begin, end] in microseconds from the shard's first begin. 504 where nothing ran.
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response

from ...actors.expert_state import ExpertState
from ...actors.request import EngineStatus, TracedStep
from ..engine_client import EngineUnreachable
from .engine_view import EngineView
from .errors import EngineUnavailable, RequestError
from .metrics import FrontMetrics

VERSION = 1
TRACED_STEPS = 8
_TRACE_TIMEOUT_S = 10.0


class EngineStates(Protocol):
    """Who asks the engines: `EnginePool`."""

    async def views(self) -> list[EngineView]: ...

    async def trace(self, engine: str, steps: int) -> EngineStatus:
        """Raises EngineUnavailable where there is no such engine, EngineUnreachable where it goes meanwhile."""
        ...


class ClusterView:
    """The handlers, of one front."""

    def __init__(self, engines: EngineStates, model_name: str, metrics: FrontMetrics) -> None:
        self._engines, self._model, self._metrics = engines, model_name, metrics
        self._begin = time.monotonic()
        self._traces: dict[str, asyncio.Task[EngineStatus]] = {}

    async def cluster(self) -> Response:
        """GET /cluster"""
        engines = [engine_body(view) for view in await self._engines.views()]
        front = self._metrics.totals() | {"seconds": time.monotonic() - self._begin}
        return _json({"version": VERSION, "model": self._model, "front": front, "engines": engines})

    async def trace(self, engine: str) -> Response:
        """GET /cluster/trace"""
        # One recording of an engine at a time, whoever asks and leaves: an idle one would gather them.
        if engine not in self._traces:
            self._traces[engine] = asyncio.ensure_future(self._engines.trace(engine, TRACED_STEPS))
            self._traces[engine].add_done_callback(lambda task: self._traced(engine, task))
        try:
            status = await asyncio.wait_for(asyncio.shield(self._traces[engine]), _TRACE_TIMEOUT_S)
        except TimeoutError:
            message = f"no {TRACED_STEPS} steps ran within {_TRACE_TIMEOUT_S:g} s; ask while requests run"
            return _json(RequestError(message, status=504, code="no_steps").body(), 504)
        except EngineUnavailable as error:
            return _json(error.body(), error.status)
        except EngineUnreachable as error:
            return _json(EngineUnavailable(str(error)).body(), 503)
        return _json({"version": VERSION, "name": engine, "steps": step_bodies(status.trace)})

    def _traced(self, engine: str, task: asyncio.Task[EngineStatus]) -> None:
        del self._traces[engine]
        if not task.cancelled():
            task.exception()  # all who asked may have left, and Python would complain


def engine_body(view: EngineView) -> dict[str, Any]:
    """An engine; with numbers where it has told any."""
    body: dict[str, Any] = {"name": view.name, "state": view.stage, "error": view.error}
    status = view.status
    if status is not None:
        body |= {
            "epoch": status.epoch,
            "shards": status.shards,
            "context_length": status.context_length,
            "precision_plan": list(status.precision_plan),
            "running": status.running,
            "waiting": status.waiting,
            "pages": {"total": status.total_pages, "free": status.free_pages, "cached": status.cached_pages},
            "steps": status.steps,
            "preemptions": status.preemptions,
            "recoveries": status.recoveries,
            "dropped_messages": status.dropped_messages,
            "prompt_tokens": status.prompt_tokens,
            "cached_tokens": status.cached_tokens,
            "experts": _experts_body(status.experts),
        }
    return body


def step_bodies(trace: tuple[TracedStep, ...]) -> list[dict[str, Any]]:
    """Each step of each shard; clocks of shards are not comparable, so each shard's time begins with its own first."""
    begins: dict[int, int] = {}
    for step in trace:
        for stage in step.stages:
            begins[step.shard] = min(begins.get(step.shard, stage.begin), stage.begin)
    return [
        {
            "step": step.step,
            "shard": step.shard,
            "stages": [
                [each.name, *((at - begins[step.shard]) / 1000 for at in (each.begin, each.end))]
                for each in step.stages
            ],
        }
        for step in trace
    ]


def _experts_body(experts: ExpertState) -> dict[str, Any]:
    return {
        "imbalance": experts.imbalance,
        "moved": experts.moved,
        "changes": experts.version,
        "failures": experts.failures,
        "layers": list(experts.layers),
        "loads": b64encode(experts.loads).decode(),
    }


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return JSONResponse(body, status, {"Cache-Control": "no-store"})
