"""How shards that all run every row put together what each computes a part of: tensor-parallel attention.

Every shard has all rows and the same routing, so no row travels. What does are results: each shard's heads, its part of
the logits, and one float32 row a (token, slot) pair of its experts. All are put side by side or in their slots, nothing
is summed on the way, and so every value is the one that a single shard would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from ..kernels.protocol import Activations
from .exchange import ExchangePoint, Received, Sent
from .model.config import ModelConfig
from .model.tensor_slice import TensorSlice

Part = Literal["heads", "logits"]


@dataclass(frozen=True)
class PartColumns:
    """Columns that each shard computes, in shard order: of the heads' results, and of the logits."""

    heads: tuple[int, ...]
    logits: tuple[int, ...]

    @staticmethod
    def of(config: ModelConfig, slices: tuple[TensorSlice, ...]) -> PartColumns:
        """As the shards' slices have it."""
        heads = tuple(config.v_head_dim * len(each.heads) for each in slices)
        return PartColumns(heads, tuple(len(each.vocabulary) for each in slices))

    def of_part(self, part: Part) -> tuple[int, ...]:
        """By the part's name."""
        return self.heads if part == "heads" else self.logits


class Gather(Protocol):
    """One shard's end. All shards call the same in the same order. Raises `LinkError` naming what is missing.

    captures: as `Exchange.captures`.
    """

    captures: bool

    @property
    def dropped(self) -> int:
        """Messages that were dropped so far."""
        ...

    def begin_step(self, step: int) -> None:
        """Forgets what is left of earlier steps."""
        ...

    def send_part(self, point: ExchangePoint, part: Part, columns: Tensor) -> None:
        """Sends this shard's columns [T, own] float to all shards. Those of one point come in the order of sending."""
        ...

    def receive_whole(self, point: ExchangePoint, part: Part) -> Tensor:
        """Waits for the columns of all shards -> [T, all], in shard order."""
        ...

    def own_pairs(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Received:
        """The pairs of rows [T, D] with experts ids [T, K] int32 (of the whole layer) that this shard runs."""
        ...

    def send_outputs(self, point: ExchangePoint, received: Received, outputs: Tensor) -> Sent:
        """Sends the outputs [P, D] float32 of `own_pairs` to all shards."""
        ...

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        """Waits for the outputs of all shards -> slots [T, K, D] float32."""
        ...
