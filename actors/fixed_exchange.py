"""The exchange between GPUs in steps in which every shard has the same number of rows, as in padded decode steps.

Then no size depends on what the gate chose, the host waits for nothing, and the whole exchange can be captured with the
kernels around it. A layer takes two transfers: every shard's rows go to all shards, each with its scale and the slots
of its experts in one buffer (with several experts a token nearly every shard is chosen by every token); and every shard
sends each other one float32 row for each of that shard's slots. Rows of slots whose expert is elsewhere are not
written and not read. Sending sums of slots instead would be a K-th of the bytes, but the sums' order, and so their
bits, would then depend on the number of shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.protocol import Activations
from .exchange import ExchangePoint, Received, Sent
from .expert_routes import ExpertRoutes
from .pair_tokens import PairTokens


@dataclass(frozen=True)
class _Dispatch:
    """ids: the slots that the rows are for. everyone: [shards * T, bytes] uint8, complete when `work` is done; values,
    scale and ids of a row in turn."""

    sent: Activations
    ids: Tensor
    everyone: Tensor
    work: dist.Work


@dataclass(frozen=True)
class _Combine:
    """arrived: [shards, T * K, D] float32, complete when `works` are done. place: [T * K] int64, the row of
    [shards * T * K] that has each slot."""

    arrived: Tensor
    place: Tensor
    works: tuple[dist.Work, ...]


class FixedExchange:
    """`Exchange` over the default process group, which `CollectiveExchange` makes.

    All shards dispatch as many rows in the same format. `Received.pair_expert` is below 0 for experts of other shards,
    which the backend's `experts` must leave out.
    """

    dropped = 0

    def __init__(self, routes: ExpertRoutes) -> None:
        """routes: this shard's; all tensors are on its device."""
        device, self._routes = routes.device, routes
        self._shard, self._shards, self._held = routes.shard, len(routes.slots), routes.slots[routes.shard]
        # What a graph of a CPU backend records are its own kernels.
        self.captures = device.type != "cpu"
        starts = [slots.start for slots in routes.slots[1:]]
        self._starts = torch.tensor(starts, dtype=torch.int32, device=device)
        self._device = device
        self._pair_tokens = PairTokens()
        self._dispatches: dict[ExchangePoint, _Dispatch] = {}
        self._combines: dict[ExchangePoint, _Combine] = {}

    def begin_step(self, step: int) -> None:
        self._dispatches.clear()
        self._combines.clear()

    def dispatch(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Sent:
        tokens, slots = ids.shape
        ids = self._routes.route(point.layer, ids)
        scale = () if activations.scale is None else (activations.scale[:, None],)
        rows = torch.cat([part.view(torch.uint8) for part in (activations.values, *scale, ids)], dim=1)
        everyone = rows.new_empty(self._shards * tokens, rows.shape[1])
        work = dist.all_gather_into_tensor(everyone, rows, async_op=True)
        assert work is not None
        self._dispatches[point] = _Dispatch(activations, ids, everyone, work)
        return Sent(tokens, slots, ())

    def receive_dispatch(self, point: ExchangePoint) -> Received:
        dispatch = self._dispatches[point]
        dispatch.work.wait()
        everyone, sent, slots = dispatch.everyone, dispatch.sent, dispatch.ids.shape[1]
        width, end = sent.values.shape[1] * sent.values.itemsize, everyone.shape[1] - 4 * slots
        values = everyone[:, :width].contiguous().view(sent.values.dtype)
        scale = None if sent.scale is None else everyone[:, width:end].contiguous().view(torch.float32)[:, 0]
        local = everyone[:, end:].contiguous().view(torch.int32).flatten() - self._held.start
        pair_expert = local.masked_fill_(local >= len(self._held), -1)
        pairs = (len(pair_expert) // self._shards,) * self._shards
        pair_token = self._pair_tokens.of(len(everyone), slots, self._device)
        return Received(Activations(sent.format, values, scale), pair_token, pair_expert, pairs)

    def send_back(self, point: ExchangePoint, received: Received, outputs: Tensor) -> None:
        ids = self._dispatches.pop(point).ids
        leaving = outputs.view(self._shards, ids.numel(), -1)
        arrived = torch.empty_like(leaving)
        peers = [peer for peer in range(self._shards) if peer != self._shard]
        transfers = [dist.P2POp(dist.isend, leaving[peer], peer) for peer in peers]
        transfers += [dist.P2POp(dist.irecv, arrived[peer], peer) for peer in peers]
        works = tuple(dist.batch_isend_irecv(transfers))
        arrived[self._shard].copy_(leaving[self._shard])
        flat = ids.flatten()
        owner = torch.bucketize(flat, self._starts, right=True)
        place = owner * len(flat) + self._pair_tokens.of(len(flat), 1, self._device)
        self._combines[point] = _Combine(arrived, place, works)

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        combine = self._combines.pop(point)
        for work in combine.works:
            work.wait()
        slots = combine.arrived.flatten(0, 1).index_select(0, combine.place)
        return slots.view(sent.tokens, sent.slots, -1)
