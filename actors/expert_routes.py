"""Where one shard sends its tokens: a table from a layer's experts to the slots that hold them, and what was chosen.

Slots of all shards have one number each (`slot_ranges`). A token goes to its own shard if that holds the expert, else
to one of the shards that do, by its row, so that they share the tokens; results do not depend on which it is.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from .expert_placement import LayerPlacement, slot_ranges

# Of more rows the columns are made anew each time: the step computes for so long that it does not count.
_KEPT_ROWS = 1024
_EVEN = 12


class ExpertRoutes:
    """One shard's. Tables and counts stay where they are and keep their shapes, so that graphs go on reading them.

    slots: every shard's numbers. table: [layers, E, W] int32, for a row r the slot that its column r % W names. counts:
    [layers, E] int32, tokens of this shard that chose each expert so far; they overflow and begin anew from below.
    """

    def __init__(
        self, shard: int, placement: LayerPlacement, layers: int, moves: bool = False, alike: bool = False
    ) -> None:
        """placement: of every layer, 0..layers-1, until `place`. moves: whether that will be called. alike: every shard
        has the same rows, and each must find for a row the same slot as all others."""
        self.shard, self._sizes, self._alike = shard, placement.sizes, alike
        self.slots = slot_ranges(placement.sizes)
        spare = sum(placement.sizes) - placement.experts
        # At least as many columns as an expert can have shards; of 2, 3, 4 and 6 shards each has as many of them.
        self._columns = -(-min(len(placement.sizes), 1 + spare) // _EVEN) * _EVEN if spare else 1
        self._placements = [placement] * layers
        shape = layers, placement.experts
        self.table = torch.from_numpy(self._rows(placement)).expand(*shape, self._columns).contiguous()
        self.counts = torch.zeros(shape, dtype=torch.int32)
        # Experts whose numbers are those of their slots, for good.
        self._same = not moves and [*itertools.chain(*placement.held)] == [*itertools.chain(*self.slots)]
        self._one = torch.ones(1, dtype=torch.int32)
        self._column = torch.arange(_KEPT_ROWS, dtype=torch.int32) % self._columns

    @property
    def device(self) -> torch.device:
        """Of `table` and `counts`."""
        return self.table.device

    def move_to(self, device: torch.device) -> None:
        """Once, before anything is routed."""
        self.table, self.counts = self.table.to(device), self.counts.to(device)
        self._one, self._column = self._one.to(device), self._column.to(device)

    def placement(self, layer: int) -> LayerPlacement:
        """Where the layer's experts are now."""
        return self._placements[layer]

    def place(self, layer: int, placement: LayerPlacement) -> None:
        """Where they are from the next `route` on. Raises ValueError for other numbers of experts or slots."""
        if placement.sizes != self._sizes or placement.experts != self.table.shape[1]:
            raise ValueError(
                f"layer {layer}: a placement of {placement.experts} experts in {placement.sizes} slots for "
                f"{self.table.shape[1]} in {self._sizes}"
            )
        self._placements[layer] = placement
        self.table[layer].copy_(torch.from_numpy(self._rows(placement)))

    def route(self, layer: int, ids: Tensor) -> Tensor:
        """ids [T, K] int32 of the layer's experts -> the slots [T, K] int32 to send them to; counts them."""
        if self.device.type == "cpu":
            return torch.from_numpy(self.route_array(layer, ids.numpy()))
        return self._route_on_device(layer, ids)

    def route_array(self, layer: int, ids: np.ndarray) -> np.ndarray:
        """`route` on the CPU."""
        counts = self.counts[layer].numpy()
        counts += np.bincount(ids.reshape(-1), minlength=len(counts)).astype(np.int32)
        if self._columns > 1:
            ids = ids * self._columns + self._columns_of(len(ids)).numpy()[:, None]
        return self.table[layer].numpy().reshape(-1)[ids]

    def _route_on_device(self, layer: int, ids: Tensor) -> Tensor:
        chosen = ids.reshape(-1)
        self.counts[layer].index_add_(0, chosen, self._one.expand(len(chosen)))
        if self._same:
            return ids
        if self._columns > 1:
            chosen = torch.add(self._columns_of(len(ids))[:, None], ids, alpha=self._columns).reshape(-1)
        return self.table[layer].view(-1).index_select(0, chosen).view(ids.shape)

    def _columns_of(self, rows: int) -> Tensor:
        """[rows] int32, the column of the table that each row reads."""
        if rows <= _KEPT_ROWS:
            return self._column[:rows]
        return torch.arange(rows, dtype=torch.int32, device=self.device) % self._columns

    def _rows(self, placement: LayerPlacement) -> np.ndarray:
        """A layer's table [E, W] int32."""
        rows = np.empty((placement.experts, self._columns), np.int32)
        for expert, places in enumerate(placement.replicas()):
            numbers = [self.slots[shard][slot] for shard, slot in places]
            if self._alike:
                rows[expert] = [numbers[column % len(numbers)] for column in range(self._columns)]
                continue
            own = [number for number in numbers if number in self.slots[self.shard]]
            # Shards begin with different replicas, so that those share evenly what several shards send.
            rows[expert] = own or [numbers[(self.shard + column) % len(numbers)] for column in range(self._columns)]
        return rows
