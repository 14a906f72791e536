"""How activations reach the shards that hold their experts, and how the experts' outputs come back.

Each layer has two phases. *Dispatch*: a shard sends every peer the rows that chose one of the peer's experts, each row
once, already quantized, with the (row, expert) pairs to run. *Combine*: the peer answers one float32 row a pair, not
weighted; the token's owner puts it into its slot and alone sums over the slots, in slot order. So no sum ever
depends on the number of shards, and results are equal to the bit for any number of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from ..kernels.protocol import Activations
from .pair_tokens import PairTokens


@dataclass(frozen=True)
class ExchangePoint:
    """Which exchange of a run this is; both sides must agree on it."""

    step: int
    layer: int
    micro_batch: int


@dataclass(frozen=True)
class MostRows:
    """The most that a shard dispatches where all have as many rows: [rows, columns], each with `slots` experts."""

    rows: int
    columns: int
    slots: int


@dataclass(frozen=True)
class Sent:
    """What a shard remembers of its dispatch until combine. positions[shard]: [P] int64, token * K + slot of each pair
    that the shard runs, in the order in which its outputs come back."""

    tokens: int
    slots: int
    positions: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Received:
    """The pairs that a shard runs in one layer, for all shards.

    activations: rows [R, D]. pair_token: [P] int32 rows of them. pair_expert: [P] int32 local expert numbers.
    pairs: how many of the P are of each shard, in shard order.
    """

    activations: Activations
    pair_token: Tensor
    pair_expert: Tensor
    pairs: tuple[int, ...]


class Exchange(Protocol):
    """Dispatch and combine of one shard. Raises `LinkError` naming the peer that is missing.

    captures: whether a graph can record all of it between the kernels that it lies between (`Kernels.capture`).
    """

    captures: bool

    @property
    def dropped(self) -> int:
        """Messages that were dropped so far."""
        ...

    def begin_step(self, step: int) -> None:
        """Forgets what is left of earlier steps."""
        ...

    def dispatch(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Sent:
        """Sends rows [T, D] to the shards of their experts ids [T, K] int32 (of the whole layer)."""
        ...

    def receive_dispatch(self, point: ExchangePoint) -> Received:
        """Waits for every shard's dispatch and joins them in shard order."""
        ...

    def send_back(self, point: ExchangePoint, received: Received, outputs: Tensor) -> None:
        """Sends outputs [P, D] float32 back to the shards that the pairs came from."""
        ...

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        """Waits for the outputs of all pairs of `sent` -> slots [T, K, D] float32."""
        ...


class LocalExchange:
    """The exchange of an engine of one shard: everything stays where it is."""

    captures = True

    def __init__(self) -> None:
        self.dropped = 0
        self._pair_tokens = PairTokens()
        self._received: dict[ExchangePoint, Received] = {}
        self._outputs: dict[ExchangePoint, Tensor] = {}

    def begin_step(self, step: int) -> None:
        self._received.clear()
        self._outputs.clear()

    def dispatch(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Sent:
        tokens, slots = ids.shape
        pair_token = self._pair_tokens.of(tokens, slots, ids.device)
        self._received[point] = Received(activations, pair_token, ids.reshape(-1), (tokens * slots,))
        return Sent(tokens, slots, (np.arange(tokens * slots),))

    def receive_dispatch(self, point: ExchangePoint) -> Received:
        return self._received.pop(point)

    def send_back(self, point: ExchangePoint, received: Received, outputs: Tensor) -> None:
        self._outputs[point] = outputs

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        return self._outputs.pop(point).reshape(sent.tokens, sent.slots, -1)
