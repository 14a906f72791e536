"""The exchange between shards on GPUs: all-to-all collectives of `torch.distributed`, NCCL or RCCL.

Shard 0 serves the store in which the shards find each other; its address travels through Ray. The store and the
collectives know no keys: the network between the nodes must be trusted.

A layer takes four collectives: sizes, rows, pairs, and the experts' outputs. Sizes are the one thing that the host
waits for. Every shard takes part in all of them, also one without tokens. With "gloo" the same runs on CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..kernels.protocol import ActivationFormat, Activations
from .collective_gather import CollectiveGather
from .exchange import Exchange, ExchangePoint, MostRows, Received, Sent
from .expert_routes import ExpertRoutes
from .fixed_exchange import FixedExchange
from .gather import Gather, PartColumns
from .link import LinkError, LinkPlace

if TYPE_CHECKING:
    from .peer_exchange import PeerExchange

_FORMATS = tuple(ActivationFormat)
_LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class _Sizes:
    """What one shard sends to another, or gets from it."""

    rows: int
    pairs: int
    format: ActivationFormat


@dataclass(frozen=True)
class _Dispatch:
    """A dispatch under way. order: [P] int64, token * K + slot of each pair sent, by the shard that runs it. rows,
    pairs: raw bytes as they arrive, when `works` are done. sizes: [shards, 2] int64 rows and pairs, on the device."""

    order: Tensor
    sent: tuple[_Sizes, ...]
    received: tuple[_Sizes, ...]
    sizes: Tensor
    rows: Tensor
    pairs: Tensor
    works: tuple[dist.Work, ...]


class CollectiveExchange:
    """`Exchange` over the default process group, of which a process has one: `connect` makes it, `close` ends it.

    For steps of any number of rows; `fixed` is for those that have the same on every shard.

    A peer that is missing is noticed after the timeout, or when its process ends the connection.
    """

    dropped = 0
    captures = False

    def __init__(self, engine: str, epoch: int, routes: ExpertRoutes, hidden_size: int, timeout_s: float) -> None:
        """routes: this shard's, which `connect` moves to the device. hidden_size: D of every row."""
        self._name, self._shard, self._shards = f"{engine}/{epoch}", routes.shard, len(routes.slots)
        self._routes = routes
        self._starts = [slots.start for slots in routes.slots]
        self._columns = hidden_size
        self._timeout = timedelta(seconds=timeout_s)
        self._store: TCPStore | None = None
        self._peer_memory: PeerExchange | None = None
        self._under_way: dict[ExchangePoint, _Dispatch] = {}
        self._outputs: dict[ExchangePoint, Tensor] = {}

    def open(self, place: LinkPlace) -> str:
        """Where the shards find each other: shard 0's address; "" of the others."""
        self._one_node = bool(place.folder)
        if self._shard:
            return ""
        host = place.host or _LOCALHOST
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout, use_libuv=True)
        return f"{host}:{self._store.port}"

    def connect(self, addresses: Sequence[str], device: torch.device, float_dtype: torch.dtype) -> None:
        """Forms the group, `addresses` as all shards' `open` gave them. device: of all tensors; float_dtype: of
        activations that are not quantized. Raises LinkError."""
        host, _, port = addresses[0].rpartition(":")
        with self._failing("forming the group"):
            if self._store is None:
                self._store = TCPStore(host, int(port), is_master=False, timeout=self._timeout)
            backend = dist.get_default_backend_for_device(device)
            # Else torch's watchdog would end this process with its peer; who is gone the router notices, and `abort`s.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            store = PrefixStore(self._name, self._store)
            dist.init_process_group(
                backend, store=store, rank=self._shard, world_size=self._shards, timeout=self._timeout
            )
            self._device = device
            self._routes.move_to(device)
            self._dtypes = {
                ActivationFormat.FLOAT: float_dtype,
                ActivationFormat.INT8: torch.int8,
                ActivationFormat.FP8: torch.float8_e4m3fn,
            }
            self._starts_there = torch.tensor(self._starts, dtype=torch.int32, device=device)
            # The first collective connects all pairs of shards, which takes long.
            self._all_to_all(torch.zeros(self._shards, dtype=torch.int64, device=device))

    def fixed(self, rows: int, slots: int) -> Exchange:
        """For steps in which all shards have the same number of rows, at most `rows`, of `slots` experts each. To be
        made by all shards at once, when the group is formed.

        CUDA's GPUs of one node write into each other's memory; elsewhere the collectives do it.
        """
        if not self._one_node or self._device.type != "cuda" or torch.version.hip is not None:
            return FixedExchange(self._routes)
        from .peer_exchange import PeerExchange  # needs Triton

        assert self._store is not None
        most, store = MostRows(rows, self._columns, slots), PrefixStore(self._name, self._store)
        with self._failing("mapping the shards' memory"):
            self._peer_memory = PeerExchange(self._routes, most, store)
        return self._peer_memory

    def gather(self, columns: PartColumns, leaves_out: bool) -> Gather:
        """For shards that all have all rows, when the group is formed; arguments as `CollectiveGather`'s."""
        return CollectiveGather(self._routes, columns, leaves_out)

    def abort(self) -> None:
        """Ends the group in the middle of a collective that waits for a shard which is gone; the thread that runs it
        gets an error. From any thread."""
        if self._peer_memory is not None:
            self._peer_memory.release()
        if dist.is_initialized():
            dist.distributed_c10d._abort_process_group()
        self._store = None

    def close(self) -> None:
        """Ends the group; no collective may run."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self._store = None

    def begin_step(self, step: int) -> None:
        self._under_way.clear()
        self._outputs.clear()

    def dispatch(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Sent:
        tokens, slots = ids.shape
        flat = self._routes.route(point.layer, ids).reshape(-1)
        owner = torch.bucketize(flat, self._starts_there[1:], right=True)
        order = owner.argsort(stable=True)
        token, owner = order // slots, owner[order]
        visits = torch.zeros(self._shards, tokens, dtype=torch.bool, device=self._device)
        visits[owner, token] = True
        pair_count = (owner == torch.arange(self._shards, device=self._device)[:, None]).sum(1)
        with self._failing(f"layer {point.layer}: dispatch"):
            sent, received, sizes = self._exchange_sizes(point, visits.sum(1), pair_count, activations.format)
            # The visits' tokens, shard by shard: a stable sort of what is not visited needs no size from the device.
            visited = (~visits).flatten().to(torch.uint8).argsort(stable=True)[: sum(each.rows for each in sent)]
            rows = self._row_bytes(activations, visited % tokens if tokens else visited)
            pair_row = (visits.cumsum(1) - 1)[owner, token].to(torch.int32)
            pairs = torch.stack([pair_row, flat[order] - self._starts_there[owner]], dim=1)
            kind = _common_format(point, received)
            rows_in, rows_work = self._send(
                rows, [each.rows for each in sent], [each.rows for each in received], self._row_size(kind)
            )
            pairs_in, pairs_work = self._send(
                pairs.view(torch.uint8), [each.pairs for each in sent], [each.pairs for each in received], 8
            )
        works = rows_work, pairs_work
        self._under_way[point] = _Dispatch(order, sent, received, sizes, rows_in, pairs_in, works)
        return Sent(tokens, slots, ())

    def receive_dispatch(self, point: ExchangePoint) -> Received:
        under_way = self._under_way[point]
        with self._failing(f"layer {point.layer}: dispatch"):
            for work in under_way.works:
                work.wait()
        kind = _common_format(point, under_way.received)
        width = self._columns * self._dtypes[kind].itemsize
        rows = under_way.rows.view(-1, self._row_size(kind))
        values = rows[:, :width].contiguous().view(self._dtypes[kind])
        scale = None if kind is ActivationFormat.FLOAT else rows[:, width:].contiguous().view(torch.float32)[:, 0]
        pair_row, pair_expert = under_way.pairs.view(torch.int32).view(-1, 2).unbind(1)
        row_count, pair_count = under_way.sizes.unbind(1)
        first = (row_count.cumsum(0) - row_count).to(torch.int32)
        offset = first.repeat_interleave(pair_count, output_size=len(pair_row))
        counts = tuple(each.pairs for each in under_way.received)
        return Received(Activations(kind, values, scale), pair_row + offset, pair_expert.contiguous(), counts)

    def send_back(self, point: ExchangePoint, received: Received, outputs: Tensor) -> None:
        asked = [each.pairs for each in self._under_way[point].sent]
        result = outputs.new_empty(sum(asked), self._columns)
        with self._failing(f"layer {point.layer}: combine"):
            dist.all_to_all_single(result, outputs.contiguous(), asked, list(received.pairs))
        self._outputs[point] = result

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        outputs, under_way = self._outputs.pop(point), self._under_way.pop(point)
        slots = torch.empty_like(outputs)
        slots[under_way.order] = outputs
        return slots.view(sent.tokens, sent.slots, self._columns)

    def _exchange_sizes(
        self, point: ExchangePoint, rows: Tensor, pairs: Tensor, format: ActivationFormat
    ) -> tuple[tuple[_Sizes, ...], tuple[_Sizes, ...], Tensor]:
        """What goes to every shard and comes from it; the host waits here. Raises LinkError for a shard elsewhere."""
        about = torch.tensor([_FORMATS.index(format), point.step, point.layer, point.micro_batch])
        about = about.to(self._device).expand(self._shards, -1)
        mine = torch.cat([torch.stack([rows, pairs], dim=1), about], dim=1)
        theirs = self._all_to_all(mine)
        host = torch.stack([mine, theirs]).tolist()
        sent, received = (tuple(_Sizes(row, pair, _FORMATS[kind]) for row, pair, kind, *_ in table) for table in host)
        for peer, (_, _, _, *where) in enumerate(host[1]):
            if where != [point.step, point.layer, point.micro_batch]:
                raise LinkError(
                    f"layer {point.layer}: shard {peer} is at step {where[0]}, layer {where[1]}, this one at step "
                    f"{point.step}"
                )
        return sent, received, theirs[:, :2]

    def _row_bytes(self, activations: Activations, tokens: Tensor) -> Tensor:
        """Rows of tokens [R] -> [R, bytes] uint8: values, then the scale if there is one."""
        values = activations.values[tokens].view(torch.uint8)
        if activations.scale is None:
            return values
        return torch.cat([values, activations.scale[tokens][:, None].view(torch.uint8)], dim=1)

    def _row_size(self, format: ActivationFormat) -> int:
        scale = 0 if format is ActivationFormat.FLOAT else 4
        return self._columns * self._dtypes[format].itemsize + scale

    def _send(self, rows: Tensor, sent: list[int], received: list[int], size: int) -> tuple[Tensor, dist.Work]:
        """rows [R, bytes] uint8, of which `sent` go to each shard -> the bytes that come, `received` rows of `size`."""
        width = rows.shape[1]
        arriving = torch.empty(sum(received) * size, dtype=torch.uint8, device=self._device)
        work = dist.all_to_all_single(
            arriving,
            rows.reshape(-1),
            [count * size for count in received],
            [count * width for count in sent],
            async_op=True,
        )
        assert work is not None
        return arriving, work

    def _all_to_all(self, values: Tensor) -> Tensor:
        """values [shards, ...]: row s goes to shard s -> the rows that come."""
        result = torch.empty_like(values)
        dist.all_to_all_single(result, values)
        return result

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """What `torch.distributed` raises for a missing peer becomes a LinkError."""
        try:
            yield
        except RuntimeError as error:
            raise LinkError(f"{what}: shard {self._shard} of {self._shards}: {error}") from error


def _common_format(point: ExchangePoint, sizes: Sequence[_Sizes]) -> ActivationFormat:
    """The format of all shards that send pairs; a shard without any may name another."""
    kinds = {each.format for each in sizes if each.pairs}
    if len(kinds) > 1:
        raise LinkError(f"layer {point.layer}: shards dispatched different activation formats")
    return kinds.pop() if kinds else sizes[0].format
