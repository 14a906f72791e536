"""What a stage program would take: its timeline from the cost of each kind of stage, without running it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .program_check import check
from .stage_program import CHANNELS, ProgramError, Stage, StageProgram

# Microseconds of one kind of work for a stage on one actor. The kinds are those of the stages, for what an actor
# computes, and "link." with the channel's name for how long its messages to all others travel.
Costs = Mapping[str, float] | Callable[[str, Stage, int], float]


@dataclass(frozen=True)
class Interval:
    """One resource of one actor at work, from begin to end in microseconds. name: of the stage or of its message."""

    role: str
    shard: int
    resource: Literal["compute", "link"]
    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All intervals of one simulated step, by begin; `duration` in microseconds."""

    program: str
    intervals: tuple[Interval, ...]
    duration: float

    def bubble_share(self, role: str | None = None, shard: int | None = None) -> float:
        """The share of the step in which compute stands still, 0..1: of one actor, of a role's, or of all."""
        actors = {
            (interval.role, interval.shard)
            for interval in self.intervals
            if role in (None, interval.role) and shard in (None, interval.shard)
        }
        if not actors:
            raise ValueError(f"program {self.program} has no actor {shard} of role {role}")
        if not self.duration:
            return 0.0
        busy = sum(
            interval.end - interval.begin
            for interval in self.intervals
            if interval.resource == "compute" and (interval.role, interval.shard) in actors
        )
        return 1 - busy / (self.duration * len(actors))


def simulate(program: StageProgram, costs: Costs, shards: int | Mapping[str, int] = 1) -> Timeline:
    """Plays one step with `shards` actors of each role, or as many as it says of each, and gives its timeline.

    An actor computes one stage after another. What it sends travels when the stage is done and its link is free, in
    the order of sending, while it computes on. A stage that receives begins when the messages of all senders are there.
    Raises `ProgramError` for a wrong program and ValueError for a cost that is missing or negative.
    """
    check(program)
    actors = dict.fromkeys(program.stages, shards) if isinstance(shards, int) else dict(shards)
    if actors.keys() != program.stages.keys():
        raise ValueError(f"shards: of {', '.join(actors)}, but the roles are {', '.join(program.stages)}")
    if min(actors.values()) < 1:
        raise ValueError(f"shards: {shards} is below 1")
    play = _Play(program, costs, actors)
    while play.advance():
        pass
    intervals = sorted(play.intervals, key=lambda item: (item.begin, item.role, item.shard, item.resource, item.end))
    return Timeline(program.name, tuple(intervals), max((item.end for item in intervals), default=0.0))


@dataclass
class _Actor:
    """One actor's remaining stages, and when its two resources are free."""

    role: str
    shard: int
    stages: deque[Stage]
    compute: float = 0.0
    link: float = 0.0


class _Play:
    """The actors in the middle of a step."""

    def __init__(self, program: StageProgram, costs: Costs, shards: Mapping[str, int]) -> None:
        self._costs = costs
        self._actors = [
            _Actor(role, shard, deque(stages))
            for role, stages in program.stages.items()
            for shard in range(shards[role])
        ]
        # A channel's senders are all actors whose role has a stage that sends to it.
        self._senders = {
            channel: sum(shards[role] for role, stages in program.stages.items() if _sends(stages, channel))
            for channel in CHANNELS
        }
        # Arrival times of what stage and micro-batch send through a channel, one for every sender.
        self._arrivals: dict[tuple[str, int, int], list[float]] = {}
        self.intervals: list[Interval] = []

    def advance(self) -> bool:
        """Moves every actor on as far as messages allow; False once all are done."""
        moved = False
        for actor in self._actors:
            while actor.stages and (ready := self._ready(actor.stages[0])) is not None:
                self._run(actor, actor.stages.popleft(), ready)
                moved = True
        if not moved and (waiting := [actor.stages[0].name for actor in self._actors if actor.stages]):
            raise ProgramError(f"stages wait for each other: {', '.join(waiting)}")
        return moved

    def _ready(self, stage: Stage) -> float | None:
        """When the stage's messages are all there; None if not all are sent."""
        if not stage.receives:
            return 0.0
        arrivals = self._arrivals.get((stage.receives, stage.layer, stage.micro_batch), [])
        return max(arrivals) if len(arrivals) == self._senders[stage.receives] else None

    def _run(self, actor: _Actor, stage: Stage, ready: float) -> None:
        begin = max(actor.compute, ready)
        actor.compute = begin + self._cost(stage.kind, stage, actor.shard)
        self.intervals.append(Interval(actor.role, actor.shard, "compute", stage.name, begin, actor.compute))
        if not stage.sends:
            return
        kind = f"link.{stage.sends}"
        begin = max(actor.link, actor.compute)
        actor.link = begin + self._cost(kind, stage, actor.shard)
        name = f"{kind}.{stage.layer}.{stage.micro_batch}"
        self.intervals.append(Interval(actor.role, actor.shard, "link", name, begin, actor.link))
        self._arrivals.setdefault((stage.sends, stage.layer, stage.micro_batch), []).append(actor.link)

    def _cost(self, kind: str, stage: Stage, shard: int) -> float:
        if callable(self._costs):
            cost = self._costs(kind, stage, shard)
        elif kind in self._costs:
            cost = self._costs[kind]
        else:
            raise ValueError(f"costs: nothing for {kind!r}, which {stage.name} needs")
        if not cost >= 0:
            raise ValueError(f"costs: {kind!r} of {stage.name} is {cost}, not 0 or more microseconds")
        return cost


def _sends(stages: Sequence[Stage], channel: str) -> bool:
    return any(stage.sends == channel for stage in stages)
