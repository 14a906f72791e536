"""Which shards hold a layer's routed experts, some of them several times: pure, no clock, no weights.

A shard has a number of slots a layer, each of which holds one expert. Where there are more slots than experts, experts
that many tokens choose are held by several shards, which share their tokens. What an expert computes does not depend
on who holds it, so placements change where work is done and never a bit of its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .engine_config import expert_ranges


@dataclass(frozen=True)
class LayerPlacement:
    """held[shard][slot]: the expert there. Every expert is somewhere, on one shard at most once.

    Raises ValueError, naming the expert, for anything else.
    """

    held: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        known = {expert for shard in self.held for expert in shard}
        missing = set(range(max(known, default=-1) + 1)) - known
        if missing or not known or min(known) < 0:
            raise ValueError(f"held: expert {min(missing, default=min(known, default=0))} is on no shard, or is none")
        for number, shard in enumerate(self.held):
            if len(set(shard)) < len(shard):
                twice = next(expert for expert in shard if shard.count(expert) > 1)
                raise ValueError(f"held: expert {twice} is on shard {number} more than once")

    @staticmethod
    def contiguous(experts: int, shards: int, redundant: int = 0) -> LayerPlacement:
        """`expert_ranges`, and with redundant slots on each shard the experts that follow its own, from 0 again behind
        the last. Raises ValueError for more shards than experts, or more slots than experts."""
        ranges = expert_ranges(experts, shards)
        _check_redundant(experts, len(ranges[0]), redundant)
        return LayerPlacement(
            tuple(tuple(expert % experts for expert in range(each.start, each.stop + redundant)) for each in ranges)
        )

    @property
    def experts(self) -> int:
        """How many there are."""
        return 1 + max(map(max, self.held))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The slots of each shard."""
        return tuple(map(len, self.held))

    def replicas(self) -> list[list[tuple[int, int]]]:
        """The (shard, slot) of each expert, by shard."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.experts)]
        for shard, slots in enumerate(self.held):
            for slot, expert in enumerate(slots):
                found[expert].append((shard, slot))
        return found


def _check_redundant(experts: int, own: int, redundant: int) -> None:
    if own + redundant > experts:
        raise ValueError(
            f"redundant_experts: {redundant} slots beside a shard's own {own} are more than the {experts} experts that "
            f"there are; at most {experts - own}"
        )


def slot_ranges(sizes: Sequence[int]) -> tuple[range, ...]:
    """Numbers for all slots of all shards: those of a shard follow each other, and every shard's first one is a
    multiple of the most slots that a shard has."""
    stride = max(sizes)
    return tuple(range(shard * stride, shard * stride + size) for shard, size in enumerate(sizes))
