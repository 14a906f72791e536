"""How a front sees an engine, for /health, /metrics and the page."""

from __future__ import annotations

from dataclasses import dataclass

from ...actors.request import EngineStatus

STAGES = ("starting", "ready", "recovering", "lost", "draining", "failed")


@dataclass(frozen=True)
class EngineView:
    """stage: one of `STAGES`; "recovering": it waits for a lost shard to go on with what it has; "lost": it does not
    answer; "draining": it ends what it has and takes nothing new. error: why it is not ready. status: what it said
    last; None before, and while it does not answer."""

    name: str
    stage: str
    error: str
    status: EngineStatus | None
