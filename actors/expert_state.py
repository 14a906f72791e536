"""What an engine tells of its experts' load and where they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .wire import message


@message(version=1)
@dataclass(frozen=True)
class HotExpert:
    """share: of all that a layer's tokens chose, 0 to 1."""

    layer: int
    expert: int
    share: float


@message(version=2)
@dataclass(frozen=True)
class ExpertState:
    """imbalance: load of the busiest shard over the mean, over all layers (`expert_balance.imbalance`); 0.0 where there
    is one shard, or no load yet. hottest: the experts of the largest shares. Since the engine takes requests: version,
    how often a layer's placement changed; moved, slots that got another expert; failures, changes that a shard could
    not read the experts for. longest_switch_s: seconds that a change kept a shard's step waiting at most.

    layers: those with routed experts. loads: [layers, E] uint8, row by row, what `load_bytes` gives; empty before the
    shards were asked first."""

    imbalance: float = 0.0
    hottest: tuple[HotExpert, ...] = ()
    version: int = 0
    moved: int = 0
    failures: int = 0
    longest_switch_s: float = 0.0
    layers: tuple[int, ...] = ()
    loads: bytes = b""


UNKNOWN = ExpertState()

EVEN_LOAD = 32
"""An expert's byte in `ExpertState.loads` where all experts of its layer are chosen alike."""


def load_bytes(shares: np.ndarray) -> bytes:
    """shares: [layers, E], of all that a layer's tokens chose. A byte each, in 32nds of an even share, at most 255."""
    return np.minimum(np.rint(shares * shares.shape[1] * EVEN_LOAD), 255).astype(np.uint8).tobytes()


@dataclass(frozen=True)
class ExpertReport:
    """What a shard has seen. counts: [layers, E] int32, as `ExpertRoutes.counts`. longest_switch_s: as above."""

    counts: np.ndarray
    longest_switch_s: float
