"""`Gather` between shard processes over ZeroMQ: everyone sends everyone what it has computed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..kernels.protocol import Activations
from .exchange import ExchangePoint, Received, Sent
from .expert_routes import ExpertRoutes
from .gather import Part, PartColumns
from .link import LinkError
from .pair_split import split_pairs
from .zmq_end import ZmqEnd
from .zmq_mail import ExchangeHeader


class ZmqGather(ZmqEnd):
    """routes: alike on all shards."""

    def __init__(
        self,
        engine: str,
        epoch: int,
        routes: ExpertRoutes,
        hidden_size: int,
        timeout_s: float,
        columns: PartColumns,
    ) -> None:
        super().__init__(engine, epoch, routes, hidden_size, timeout_s)
        self._columns = columns
        self._own_parts: dict[tuple[ExchangePoint, Part], np.ndarray] = {}
        self._positions: dict[ExchangePoint, Sent] = {}

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
        if len(rows):  # else nobody waits for them
            self._own_outputs[point] = rows
            self._mail.send(self._mail.peers, point, "combine", [rows], self._hidden_size, pairs=len(rows))
        return self._positions.pop(point)

    def _open_part(self, point: ExchangePoint, part: Part, sender: int, rows: int) -> np.ndarray:
        header, payload = self._mail.take(point, part, sender)
        if header.rows != rows:
            raise LinkError(
                f"layer {point.layer}: shard {sender} sent the {part} of {header.rows} rows, there are {rows}"
            )
        return np.frombuffer(payload, np.float32).reshape(rows, header.columns)

    def _fits(self, header: ExchangeHeader) -> bool:
        if header.phase in ("heads", "logits"):
            return header.columns == self._columns.of_part(header.phase)[header.sender]
        return super()._fits(header)
