"""The exchange between GPUs of one node that write into each other's memory, for steps with as many rows on each.

A layer's dispatch writes each row to every shard, with the numbers of its experts there; combine writes each output
right into its slot. Only the shards' meeting before either is read is waited for, by the device. So what travels is no
more than what is needed, and there is nothing to pack, to unpack or to put in order: a collective would carry each
token's slots from every shard, used or not.

Two meetings a layer keep one set of buffers safe. Who writes rows of the next layer has met all after the experts of
this one had read theirs; who writes outputs has met all after they had combined those of the layer before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from ..kernels.protocol import Activations
from ..kernels.triton.peers import meet, push_outputs, push_rows
from .exchange import ExchangePoint, MostRows, Received, Sent
from .expert_routes import ExpertRoutes
from .pair_tokens import PairTokens
from .peer_memory import PeerMemory

# More turns than any step takes, and less than half of what a counter holds.
_FAR = 1 << 29


class PeerExchange:
    """`Exchange` over `PeerMemory`. All shards dispatch as many rows in the same format.

    `Received.pair_expert` is -1 for experts of other shards, which the backend's `experts` must leave out. A shard that
    is gone is waited for until `release`.
    """

    dropped = 0
    captures = True

    def __init__(self, routes: ExpertRoutes, most: MostRows, store: Store) -> None:
        """routes: this shard's, on its device. store: see `PeerMemory`. All shards make theirs at once."""
        if most.columns % 4:
            raise ValueError(f"rows of {most.columns} columns cannot be sent in words of four")
        shard, device, self._routes = routes.shard, routes.device, routes
        self._shard, self._shards, self._most, self._device = shard, len(routes.slots), most, device
        rows = most.rows * self._shards
        parts = (
            (torch.float32, rows * most.columns),
            (torch.float32, rows),
            (torch.int32, rows * most.slots),
            (torch.float32, most.rows * most.slots * most.columns),
            (torch.int32, self._shards),
        )
        self._memory = PeerMemory(parts, shard, self._shards, device, store)
        self._values, self._scale, self._expert, self._slots, self._flags = self._memory.own
        *self._row_places, self._slot_places, self._flag_places = self._memory.places
        self._turn = torch.zeros(1, dtype=torch.int32, device=device)
        self._held = (
            torch.tensor([slots.start for slots in routes.slots], dtype=torch.int32, device=device),
            torch.tensor([len(slots) for slots in routes.slots], dtype=torch.int32, device=device),
        )
        self._pair_tokens = PairTokens()
        self._sent: dict[ExchangePoint, tuple[Activations, Tensor]] = {}

    def release(self) -> None:
        """Has this GPU wait for nobody any more, for a shard is gone; what it computes from now on means nothing. From
        another thread than that of the steps."""
        torch.accelerator.set_device_index(self._device.index)  # each thread has a current device
        with torch.Stream(self._device) as beside:
            self._flags.add_(_FAR)
        beside.synchronize()

    def begin_step(self, step: int) -> None:
        self._sent.clear()

    def dispatch(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Sent:
        if len(ids) > self._most.rows or activations.values.shape[1] != self._most.columns:
            raise ValueError(f"rows {tuple(activations.values.shape)} do not fit {self._most}")
        values, scale, expert = self._row_places
        routes = self._routes.table[point.layer], self._routes.counts[point.layer]
        push_rows(activations, ids, routes, (values, scale, expert), self._held, self._shard)
        self._sent[point] = activations, ids
        return Sent(len(ids), ids.shape[1], ())

    def receive_dispatch(self, point: ExchangePoint) -> Received:
        activations, ids = self._sent.pop(point)
        meet(self._flag_places, self._flags, self._turn, self._shard)
        rows, slots = self._shards * len(ids), ids.shape[1]
        values = self._values.view(activations.values.dtype)[: rows * self._most.columns].view(rows, -1)
        scale = None if activations.scale is None else self._scale[:rows]
        pairs = (len(ids) * slots,) * self._shards
        return Received(
            Activations(activations.format, values, scale),
            self._pair_tokens.of(rows, slots, self._device),
            self._expert[: rows * slots],
            pairs,
        )

    def send_back(self, point: ExchangePoint, received: Received, outputs: Tensor) -> None:
        push_outputs(outputs, received.pair_expert, self._slot_places)

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        meet(self._flag_places, self._flags, self._turn, self._shard)
        shape = sent.tokens, sent.slots, self._most.columns
        return self._slots[: sent.tokens * sent.slots * self._most.columns].view(shape)
