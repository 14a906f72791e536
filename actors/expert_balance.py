"""Which placement of a layer's experts spreads their load over the shards: greedy, and the same for the same loads.

First experts are given replicas, one after another to that whose replicas have the most load each; then replicas are
packed, those of the most load first, each on the shard with the least so far. (The idea is DeepSeek's EPLB.) That says
how even a placement can be; what is taken is the one now, mended by as few moves as reach about that. Replicas of an
expert are taken to have equal loads, as `ExpertRoutes` deals them out where all shards run the same kind of text.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .expert_placement import LayerPlacement

_ABOUT = 1.02
"""Placements whose busiest shards have loads within this ratio do about as well."""
_LESS = 1 - 1e-9
# Replicas of other experts of a shard relieve it less.
_HOTTEST = 4


def shard_loads(loads: np.ndarray, placement: LayerPlacement) -> np.ndarray:
    """loads [E] of a layer's experts -> [shards], what its shards have to do."""
    each = loads / [len(places) for places in placement.replicas()]
    return np.array([each[list(held)].sum() for held in placement.held])


def imbalance(loads: np.ndarray, placements: Sequence[LayerPlacement]) -> float:
    """loads [layers, E], of each layer its placement -> load of the busiest shard over that of the mean, 1.0 where all
    have the same; 0.0 without load. Shards wait for each other in every layer, so each has a busiest one of its own."""
    shards = [shard_loads(layer, placement) for layer, placement in zip(loads, placements, strict=True)]
    mean = sum(float(each.mean()) for each in shards)
    return sum(float(each.max()) for each in shards) / mean if mean else 0.0


def balanced(loads: np.ndarray, current: LayerPlacement) -> LayerPlacement:
    """loads [E] -> a placement in the same slots whose busiest shard has at most the load that it has now, and that it
    would have with contiguous experts; `current` itself where little is to be gained."""
    if not loads.any() or len(current.sizes) == 1:
        return current
    packed = _Packing(loads, current.sizes).placement
    redundant = (sum(current.sizes) - current.experts) // len(current.sizes)
    contiguous = LayerPlacement.contiguous(current.experts, len(current.sizes), redundant)
    mended = _Mending(loads, current).placement(_ABOUT * shard_loads(loads, packed).max())
    options = [current, mended, packed, contiguous]
    peaks = [float(shard_loads(loads, option).max()) for option in options]
    best, most = min(peaks), peaks[-1]
    chosen = next(option for option, peak in zip(options, peaks, strict=True) if peak <= min(best * _ABOUT, most))
    return _arranged(chosen, current)


def moves(placement: LayerPlacement, current: LayerPlacement) -> int:
    """How many slots hold another expert than now."""
    pairs = zip(placement.held, current.held, strict=True)
    return sum(new != old for there, here in pairs for new, old in zip(there, here, strict=True))


def _replicas(loads: np.ndarray, spare: int, shards: int) -> list[int]:
    """How often each expert is held, `spare` times more than once, at most by every shard."""
    counts = [1] * len(loads)
    # The largest load a replica first, then the lowest number.
    heap = [(-float(load), expert) for expert, load in enumerate(loads)] if shards > 1 else []
    heapq.heapify(heap)
    for _ in range(spare):
        _, expert = heapq.heappop(heap)
        counts[expert] += 1
        if counts[expert] < shards:
            heapq.heappush(heap, (-float(loads[expert]) / counts[expert], expert))
    return counts


class _Packing:
    """A distribution of replicas over shards from nothing."""

    def __init__(self, loads: np.ndarray, sizes: tuple[int, ...]) -> None:
        counts = _replicas(loads, sum(sizes) - len(loads), len(sizes))
        self._each = [float(load) / count for load, count in zip(loads, counts, strict=True)]
        self._sizes = sizes
        self._held: list[set[int]] = [set() for _ in sizes]
        self._loads = [0.0] * len(sizes)
        for expert in sorted(range(len(loads)), key=lambda expert: (-self._each[expert], expert)):
            for _ in range(counts[expert]):
                self._add(expert)

    @property
    def placement(self) -> LayerPlacement:
        return LayerPlacement(tuple(tuple(sorted(held)) for held in self._held))

    def _add(self, expert: int) -> None:
        room = [shard for shard, held in enumerate(self._held) if len(held) < self._sizes[shard] and expert not in held]
        if room:
            self._put(expert, min(room, key=lambda shard: (self._loads[shard], shard)))
        else:
            self._make_room(expert)

    def _make_room(self, expert: int) -> None:
        """All shards with room hold the expert: the lightest of another shard's that can goes there in its place.

        There is one: shards have about as many slots, and a full one without the expert holds more than one with room.
        """
        options = [
            (self._each[other], other, full, room)
            for room, held in enumerate(self._held)
            if len(held) < self._sizes[room]
            for full, theirs in enumerate(self._held)
            if expert not in theirs
            for other in theirs - held
        ]
        _, other, full, room = min(options)
        self._held[full].remove(other)
        self._loads[full] -= self._each[other]
        self._put(other, room)
        self._put(expert, full)

    def _put(self, expert: int, shard: int) -> None:
        self._held[shard].add(expert)
        self._loads[shard] += self._each[expert]


@dataclass(frozen=True)
class _Change:
    """The busiest shard of those that it touches has `peak` then. slots: (shard, slot, its new expert)."""

    peak: float
    slots: tuple[tuple[int, int, int], ...]


class _Mending:
    """A placement that is changed slot by slot: the busiest shard swaps an expert with another shard, or another shard
    takes a replica of one of its experts in the place of an expert that is elsewhere too."""

    def __init__(self, loads: np.ndarray, current: LayerPlacement) -> None:
        self._loads = [float(load) for load in loads]
        self._held = [list(held) for held in current.held]
        self._on = [{shard for shard, _ in places} for places in current.replicas()]
        self._sums = self._sum()

    def placement(self, target: float) -> LayerPlacement:
        """Changed until no shard has more than `target`, or no change helps."""
        for _ in range(sum(map(len, self._held))):
            peak = max(self._sums)
            busiest = self._sums.index(peak)
            found = [] if peak <= target else [*self._swaps(busiest), *self._new_replicas(busiest)]
            change = min(found, key=lambda change: (change.peak, len(change.slots), change.slots), default=None)
            if change is None or change.peak >= peak * _LESS:
                break
            for shard, slot, expert in change.slots:
                self._on[self._held[shard][slot]].discard(shard)
                self._held[shard][slot] = expert
            for shard, _, expert in change.slots:
                self._on[expert].add(shard)
            self._sums = self._sum()
        return LayerPlacement(tuple(map(tuple, self._held)))

    def _each(self, expert: int) -> float:
        return self._loads[expert] / len(self._on[expert])

    def _sum(self) -> list[float]:
        return [sum(map(self._each, held)) for held in self._held]

    def _swaps(self, busiest: int) -> Iterator[_Change]:
        """The best swap with each other shard."""
        mine = np.array([self._each(expert) for expert in self._held[busiest]])
        for shard, held in enumerate(self._held):
            theirs = np.array([self._each(expert) for expert in held])
            more = theirs[None, :] - mine[:, None]
            peaks = np.maximum(self._sums[busiest] + more, self._sums[shard] - more)
            peaks[[shard in self._on[expert] for expert in self._held[busiest]]] = np.inf
            peaks[:, [busiest in self._on[expert] for expert in held]] = np.inf
            slot, other = np.unravel_index(int(peaks.argmin()), peaks.shape)
            if peaks[slot, other] < np.inf:
                here, there = self._held[busiest][slot], held[other]
                yield _Change(float(peaks[slot, other]), ((busiest, int(slot), there), (shard, int(other), here)))

    def _new_replicas(self, busiest: int) -> Iterator[_Change]:
        """Of the experts of the most load; each in the place of any that another shard could do without."""
        hot = sorted(self._held[busiest], key=lambda expert: (-self._each(expert), expert))[:_HOTTEST]
        for shard, held in enumerate(self._held):
            spare = [(slot, expert) for slot, expert in enumerate(held) if len(self._on[expert]) > 1]
            for expert in hot:
                if shard not in self._on[expert]:
                    yield from (self._replica(expert, shard, slot, other) for slot, other in spare if other != expert)

    def _replica(self, expert: int, shard: int, slot: int, other: int) -> _Change:
        """`expert` in a slot that holds `other`."""
        more, fewer = len(self._on[expert]) + 1, len(self._on[other]) - 1
        less, added = self._each(expert) - self._loads[expert] / more, self._loads[other] / fewer - self._each(other)
        sums = {each: self._sums[each] for each in self._on[expert] | self._on[other] | {shard}}
        for each in self._on[expert]:
            sums[each] -= less
        for each in self._on[other] - {shard}:
            sums[each] += added
        sums[shard] += self._loads[expert] / more - self._each(other)
        return _Change(max(sums.values()), ((shard, slot, expert),))


def _arranged(chosen: LayerPlacement, current: LayerPlacement) -> LayerPlacement:
    """The same experts on each shard; those that are there now keep their slots."""
    held = []
    for there, here in zip(chosen.held, current.held, strict=True):
        coming = iter([expert for expert in there if expert not in here])
        held.append(tuple(expert if expert in there else next(coming) for expert in here))
    return LayerPlacement(tuple(held))
