"""What an engine replica says of itself to whoever asks over Serve's handle."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..actors.link import LinkKeys


@dataclass(frozen=True)
class EngineAddress:
    """Where an engine's router listens. keys: None for Unix sockets. longest_sequence: tokens of prompt and answer.

    answers: what these depend on (`EngineConfig.answers`). page_size: tokens a page of its prefix cache; 0: none.
    """

    address: str
    keys: LinkKeys | None
    longest_sequence: int
    answers: str
    page_size: int


@dataclass(frozen=True)
class EngineState:
    """How an engine is. stage: "starting", "ready", or "failed" with an `error`, also after it was ready.

    name: of all engines its own. for_good: no engine will take its place. address: when it is ready. read and total:
    bytes of weights, of all shards. seconds: of the start, so far.
    """

    name: str
    stage: str
    error: str
    for_good: bool
    address: EngineAddress | None
    precision_plan: tuple[str, ...]
    golden: str
    read: int
    total: int
    seconds: float

    def seconds_left(self, last_start: float) -> int | None:
        """About how long until one is ready: by the last start's time, or by the weights read so far; None: unknown."""
        done = self.seconds if self.stage == "starting" else 0.0
        whole = last_start or (done * self.total / self.read if self.read else 0.0)
        return max(math.ceil(whole - done), 1) if whole else None
