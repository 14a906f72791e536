"""`Gather` between shard processes over ZeroMQ: everyone sends everyone what it has computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import zmq
from torch import Tensor

from ..kernels.protocol import Activations
from .exchange import ExchangePoint, Received, Sent
from .expert_routes import ExpertRoutes
from .gather import Part, PartColumns
from .link import LinkError, LinkPlace, Links
from .pair_split import split_pairs
from .zmq_mail import ExchangeHeader, ZmqMail


class ZmqGather:
    """Peer to peer over ZeroMQ (`ZmqMail`)."""

    captures = False

    def __init__(
        self,
        engine: str,
        epoch: int,
        routes: ExpertRoutes,
        hidden_size: int,
        timeout_s: float,
        columns: PartColumns,
    ) -> None:
        """routes: this shard's, alike on all. hidden_size: D of every row."""
        self._shard, self._hidden_size, self._columns, self._routes = routes.shard, hidden_size, columns, routes
        self._first = np.array([slots.start for slots in routes.slots], dtype=np.int32)
        self._mail = ZmqMail(engine, epoch, routes.shard, len(routes.slots), timeout_s, self._fits)
        self._own_parts: dict[tuple[ExchangePoint, Part], np.ndarray] = {}
        self._own_outputs: dict[ExchangePoint, np.ndarray] = {}
        self._positions: dict[ExchangePoint, Sent] = {}

    @property
    def dropped(self) -> int:
        """Messages that were not for this shard, or came too late."""
        return self._mail.dropped

    def open(self, links: Links, place: LinkPlace) -> str:
        """See `ZmqMail`."""
        return self._mail.open(links, place)

    def connect(self, links: Links, addresses: Sequence[str], interrupts: Sequence[zmq.Socket] = ()) -> None:
        """See `ZmqMail`."""
        self._mail.connect(links, addresses, interrupts)

    def begin_step(self, step: int) -> None:
        self._mail.begin_step(step)
        self._own_parts.clear()
        self._own_outputs.clear()
        self._positions.clear()

    def send_part(self, point: ExchangePoint, part: Part, columns: Tensor) -> None:
        values = columns.numpy()
        self._own_parts[point, part] = values
        self._mail.send(self._mail.peers, point, part, [values], values.shape[1], rows=len(values))

    def receive_whole(self, point: ExchangePoint, part: Part) -> Tensor:
        own = self._own_parts.pop((point, part))
        self._mail.wait(point, part, self._mail.peers)
        widths = self._columns.of_part(part)
        whole = np.empty((len(own), sum(widths)), np.float32)
        end = 0
        for shard, width in enumerate(widths):
            begin, end = end, end + width
            whole[:, begin:end] = own if shard == self._shard else self._open_part(point, part, shard, len(own))
        return torch.from_numpy(whole)

    def own_pairs(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Received:
        tokens, slots = ids.shape
        parts = split_pairs(self._routes.route_array(point.layer, ids.numpy()), self._first)
        self._positions[point] = Sent(tokens, slots, tuple(pairs.positions for pairs in parts))
        own = parts[self._shard]
        pair_token = torch.from_numpy((own.positions // slots).astype(np.int32))
        counts = tuple(len(pairs.positions) for pairs in parts)
        return Received(activations, pair_token, torch.from_numpy(own.pair_expert), counts)

    def send_outputs(self, point: ExchangePoint, received: Received, outputs: Tensor) -> Sent:
        rows = outputs.numpy()
        self._own_outputs[point] = rows
        if len(rows):  # else nobody waits for them
            self._mail.send(self._mail.peers, point, "combine", [rows], self._hidden_size, pairs=len(rows))
        return self._positions.pop(point)

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        owing = [peer for peer in self._mail.peers if len(sent.positions[peer])]
        self._mail.wait(point, "combine", owing)
        slots = np.empty((sent.tokens * sent.slots, self._hidden_size), np.float32)
        slots[sent.positions[self._shard]] = self._own_outputs.pop(point)
        for peer in owing:
            header, payload = self._mail.take(point, "combine", peer)
            asked = len(sent.positions[peer])
            if header.pairs != asked:
                raise LinkError(f"layer {point.layer}: shard {peer} sent {header.pairs} pairs, it has {asked} here")
            slots[sent.positions[peer]] = np.frombuffer(payload, np.float32).reshape(-1, self._hidden_size)
        return torch.from_numpy(slots).view(sent.tokens, sent.slots, self._hidden_size)

    def _open_part(self, point: ExchangePoint, part: Part, sender: int, rows: int) -> np.ndarray:
        header, payload = self._mail.take(point, part, sender)
        if header.rows != rows:
            raise LinkError(
                f"layer {point.layer}: shard {sender} sent the {part} of {header.rows} rows, there are {rows}"
            )
        return np.frombuffer(payload, np.float32).reshape(rows, header.columns)

    def _fits(self, header: ExchangeHeader) -> bool:
        match header.phase:
            case "combine":
                return header.columns == self._hidden_size
            case "heads" | "logits":
                return header.columns == self._columns.of_part(header.phase)[header.sender]
        return False
