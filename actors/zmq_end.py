"""What both ways of exchanging between shard processes over ZeroMQ share: the mail, and taking in outputs of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import zmq
from torch import Tensor

from .exchange import ExchangePoint, Sent
from .expert_routes import ExpertRoutes
from .link import LinkError, LinkPlace, Links
from .zmq_mail import ExchangeHeader, ZmqMail


class ZmqEnd:
    """One shard's end, peer to peer (`ZmqMail`)."""

    captures = False

    def __init__(self, engine: str, epoch: int, routes: ExpertRoutes, hidden_size: int, timeout_s: float) -> None:
        """routes: this shard's. hidden_size: D of every row."""
        self._shard, self._hidden_size, self._routes = routes.shard, hidden_size, routes
        self._first = np.array([slots.start for slots in routes.slots], dtype=np.int32)
        self._mail = ZmqMail(engine, epoch, routes.shard, len(routes.slots), timeout_s, self._fits)
        self._own_outputs: dict[ExchangePoint, np.ndarray] = {}

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

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        """Waits for the outputs of all pairs of `sent` -> slots [T, K, D] float32."""
        owing = [peer for peer in self._mail.peers if len(sent.positions[peer])]
        self._mail.wait(point, "combine", owing)
        slots = np.empty((sent.tokens * sent.slots, self._hidden_size), np.float32)
        own = sent.positions[self._shard]
        if len(own):
            slots[own] = self._own_outputs.pop(point)
        for peer in owing:
            header, payload = self._mail.take(point, "combine", peer)
            pairs, asked = header.pairs, len(sent.positions[peer])
            if pairs != asked:
                raise LinkError(f"layer {point.layer}: shard {peer} sent outputs of {pairs} pairs, not of {asked}")
            slots[sent.positions[peer]] = np.frombuffer(payload, np.float32).reshape(-1, self._hidden_size)
        return torch.from_numpy(slots).view(sent.tokens, sent.slots, self._hidden_size)

    def _fits(self, header: ExchangeHeader) -> bool:
        return header.phase == "combine" and header.columns == self._hidden_size
