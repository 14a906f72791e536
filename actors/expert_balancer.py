"""Gathers from an engine's shards how often experts are chosen, and has them moved where that evens out the load.

A layer changes at a time: all shards read what they newly need while steps go on, and when all are ready the router's
next plan names the change, at which all of them switch. Where one cannot read an expert, nothing changes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import ray
import ray.exceptions

from .expert_balance import balanced, imbalance, moves
from .expert_placement import LayerPlacement
from .expert_state import ExpertReport, ExpertState, HotExpert, load_bytes

_GATHER_S = 5.0
_HALF_LIFE_S = 60.0
"""How long ago a token counts half as much, unless experts are moved more often."""
_ENOUGH = 16
"""Tokens an expert, on average, before a layer's experts are moved for them."""
_HOTTEST = 5
_PATIENCE_S = 0.2

logger = logging.getLogger(__name__)


class Switching(Protocol):
    """The router's loop, as far as it concerns moves."""

    error: str
    experts: ExpertState

    def switch(self, version: int) -> bool:
        """Has all plans name this change; True when a step with it is done, False if none will be."""
        ...


class ExpertBalancer:
    """Of one engine, in a thread of its own from `start` to `stop`. What it finds is the loop's `experts`."""

    def __init__(
        self,
        shards: Sequence[Any],
        loop: Switching,
        layers: Sequence[int],
        placements: Sequence[LayerPlacement],
        interval_s: float,
    ) -> None:
        """shards: handles of `ShardActor`. layers: those with routed experts, and where these are now. interval_s: from
        one look at the placement to the next; 0: nothing is moved."""
        self._shards, self._loop, self._layers, self._interval_s = list(shards), loop, tuple(layers), interval_s
        self._placements = list(placements)
        self._loads = np.zeros((len(self._layers), placements[0].experts))
        self._seen: list[np.ndarray | None] = [None] * len(self._shards)
        self._gathered = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-balancer", daemon=True)

    @property
    def placements(self) -> tuple[LayerPlacement, ...]:
        """Of the layers, once it has stopped: the last that plans name."""
        return tuple(self._placements)

    def start(self) -> None:
        """Begins to gather."""
        self._thread.start()

    def stop(self) -> None:
        """Returns when nothing is asked of the shards any more; the loop must not wait for anything."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        period = min(_GATHER_S, self._interval_s or _GATHER_S)
        self._gathered = due = time.monotonic()
        while not self._stopping.wait(period) and not self._loop.error:
            self._gather()
            if self._interval_s and time.monotonic() >= due + self._interval_s:
                self._rebalance()
                due = time.monotonic()

    def _gather(self) -> None:
        """Adds what the shards' tokens chose since the last time, what was before counting less and less."""
        reports: list[ExpertReport] | None = self._ask("expert_report")
        if reports is None:
            return
        now = time.monotonic()
        self._loads *= 0.5 ** ((now - self._gathered) / (self._interval_s or _HALF_LIFE_S))
        self._gathered = now
        for shard, report in enumerate(reports):
            seen, counts = self._seen[shard], report.counts[list(self._layers)]
            self._loads += counts if seen is None else (counts - seen).view(np.uint32)  # counts may have overflowed
            self._seen[shard] = counts
        longest = max(report.longest_switch_s for report in reports)
        self._tell(longest_switch_s=longest)

    def _rebalance(self) -> None:
        """Layer by layer, until one cannot be changed."""
        for number, layer in enumerate(self._layers):
            loads, now = self._loads[number], self._placements[number]
            if loads.sum() < _ENOUGH * len(loads):
                continue
            placement = balanced(loads, now)
            if placement != now and not self._move(layer, placement, moves(placement, now)):
                return
            self._placements[number] = placement
        self._tell()

    def _move(self, layer: int, placement: LayerPlacement, slots: int) -> bool:
        state = self._loop.experts
        version = state.version + 1
        if self._ask("stage_experts", version, layer, placement) is None:
            if not self._stopping.is_set():
                self._loop.experts = replace(self._loop.experts, failures=state.failures + 1)
                self._ask("discard_experts", version)
            return False
        if not self._loop.switch(version):
            return False
        self._loop.experts = replace(self._loop.experts, version=version, moved=state.moved + slots)
        return True

    def _tell(self, **changes: Any) -> None:
        shares = self._loads / np.maximum(self._loads.sum(1, keepdims=True), 1e-30)
        order = shares.argsort(axis=None, kind="stable")[::-1][:_HOTTEST]
        places = zip(*np.unravel_index(order, shares.shape), strict=True)
        hottest = tuple(
            HotExpert(self._layers[layer], int(expert), float(shares[layer, expert]))
            for layer, expert in places
            if shares[layer, expert] > 0
        )
        uneven = imbalance(self._loads, self._placements)
        told = {"imbalance": uneven, "hottest": hottest, "layers": self._layers}
        self._loop.experts = replace(self._loop.experts, loads=load_bytes(shares), **told, **changes)

    def _ask(self, method: str, *arguments: Any) -> list[Any] | None:
        """What a method of every shard gives; None, and the errors in the log, if one fails, or when it must end."""
        if self._stopping.is_set():
            return None
        calls = [getattr(shard, method).remote(*arguments) for shard in self._shards]
        waiting = calls
        while waiting and not self._stopping.is_set() and not self._loop.error:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_PATIENCE_S)
        if waiting:
            return None
        answers = []
        for shard, call in enumerate(calls):
            try:
                answers.append(ray.get(call))
            except ray.exceptions.RayTaskError as error:
                logger.error("shard %d: %s: %s", shard, method, error.cause)
            except ray.exceptions.RayActorError:  # the loop says what became of it
                pass
        return answers if len(answers) == len(calls) else None
