"""`Gather` by collectives of `torch.distributed`, for any number of rows: all shards have the same.

No size depends on what the gate chose, so where the kernels leave out the pairs of other shards' experts the host waits
for nothing, and all can be captured with the kernels around it. The experts' outputs are summed as integers: of the
bits of each float32 one shard has them and all others zeros, so that the sum is those bits. That takes twice the bytes
of the outputs however many shards there are; to gather them would take as many times the bytes as there are shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.protocol import Activations
from .exchange import ExchangePoint, Received, Sent
from .expert_routes import ExpertRoutes
from .gather import Part, PartColumns
from .pair_tokens import PairTokens


@dataclass(frozen=True)
class _Travelling:
    """values: complete when `work` is done."""

    values: Tensor
    work: dist.Work


class CollectiveGather:
    """Over the default process group, which `CollectiveExchange` makes."""

    dropped = 0

    def __init__(self, routes: ExpertRoutes, columns: PartColumns, leaves_out: bool) -> None:
        """routes: this shard's, alike on all. leaves_out: whether the backend's `experts` leaves out pairs whose expert
        is below 0 (`AheadKernels.leaves_out`)."""
        self._shards, self._slots, self._routes = len(routes.slots), routes.slots[routes.shard], routes
        self._columns, self._leaves_out = columns, leaves_out
        # What a graph of a CPU backend records are its own kernels.
        self.captures = leaves_out and routes.device.type != "cpu"
        self._pair_tokens = PairTokens()
        self._parts: dict[tuple[ExchangePoint, Part], _Travelling] = {}
        self._own: dict[ExchangePoint, tuple[torch.Size, Tensor]] = {}
        self._outputs: dict[ExchangePoint, _Travelling] = {}

    def begin_step(self, step: int) -> None:
        self._parts.clear()
        self._own.clear()
        self._outputs.clear()

    def send_part(self, point: ExchangePoint, part: Part, columns: Tensor) -> None:
        rows, own = columns.shape
        most = max(self._columns.of_part(part))
        mine = columns.contiguous() if own == most else torch.nn.functional.pad(columns, (0, most - own))
        everyone = mine.new_empty(self._shards * rows, most)
        work = dist.all_gather_into_tensor(everyone, mine, async_op=True)
        assert work is not None
        self._parts[point, part] = _Travelling(everyone, work)

    def receive_whole(self, point: ExchangePoint, part: Part) -> Tensor:
        travelling = self._parts.pop((point, part))
        travelling.work.wait()
        each = travelling.values.chunk(self._shards)
        widths = self._columns.of_part(part)
        return torch.cat([values[:, :width] for values, width in zip(each, widths, strict=True)], dim=1)

    def own_pairs(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Received:
        tokens, slots = ids.shape
        pair_token = self._pair_tokens.of(tokens, slots, ids.device)
        pair_expert = self._routes.route(point.layer, ids).flatten() - self._slots.start
        here = (pair_expert >= 0) & (pair_expert < len(self._slots))
        self._own[point] = ids.shape, here
        if self._leaves_out:
            return Received(activations, pair_token, pair_expert.masked_fill(~here, -1), ())
        return Received(activations, pair_token[here], pair_expert[here], ())

    def send_outputs(self, point: ExchangePoint, received: Received, outputs: Tensor) -> Sent:
        (tokens, slots), here = self._own.pop(point)
        bits = outputs.view(torch.int32)
        if self._leaves_out:  # what is left out is not written
            placed = bits.masked_fill(~here[:, None], 0)
        else:
            placed = bits.new_zeros(len(here), outputs.shape[1])
            placed[here] = bits
        work = dist.all_reduce(placed, async_op=True)
        assert work is not None
        self._outputs[point] = _Travelling(placed, work)
        return Sent(tokens, slots, ())

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        travelling = self._outputs.pop(point)
        travelling.work.wait()
        return travelling.values.view(torch.float32).view(sent.tokens, sent.slots, -1)
