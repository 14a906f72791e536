"""Where a request may run, and which sequences make room for it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .live_request import LiveRequest
from .scheduled_shard import ScheduledShard
from .scheduler_config import SchedulerConfig

CACHED_WEIGHT = 2
"""What a page of the prompt that need not run is worth, in pages that a shard holds already.

Above 1, or a shard that has computed a long prefix would lose its next user to an empty one just for holding the
prefix. Not much more, or what all prompts begin with, the chat template, would bring all of them to one shard.
"""


@dataclass(frozen=True)
class Placement:
    """victims: sequences that must be preempted first."""

    shard: int
    victims: tuple[LiveRequest, ...] = ()


def place(live: LiveRequest, shards: Sequence[ScheduledShard], config: SchedulerConfig) -> Placement | None:
    """The shard for a request, or None if it has to wait.

    Of the shards with room it is the one with the fewest pages held, the request's cached prefix counted against
    them; at ties the lowest. Without room, sequences of lower priorities are preempted, as few as will do.
    """
    full = sum(len(shard.running) for shard in shards) >= config.max_sequences
    fitting = [index for index, shard in enumerate(shards) if shard.has_room(live)]
    if fitting:
        best = _best(live, shards, fitting)
        if not full:
            return Placement(best)
        victim = _last(shards, live.request.priority) if config.preemption else None
        return Placement(best, (victim,)) if victim is not None else None
    if not config.preemption:
        return None
    victims = {index: found for index, shard in enumerate(shards) if (found := shard.victims(live)) is not None}
    if not victims:
        return None
    fewest = min(map(len, victims.values()))
    best = _best(live, shards, [index for index, found in victims.items() if len(found) == fewest])
    return Placement(best, victims[best])


def _best(live: LiveRequest, shards: Sequence[ScheduledShard], among: Sequence[int]) -> int:
    if len(among) == 1:
        return among[0]
    return min(among, key=lambda index: shards[index].load - CACHED_WEIGHT * shards[index].shared_pages(live))


def _last(shards: Sequence[ScheduledShard], priority: int) -> LiveRequest | None:
    """The sequence of a lower priority than this that is preempted first."""
    found = (live for shard in shards for live in shard.running if live.request.priority > priority)
    return max((live for live in found if not live.scoring), key=lambda live: live.rank, default=None)
