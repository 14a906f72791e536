"""The exchange between shard processes over ZeroMQ.

Every peer gets a message in every dispatch, also an empty one, so that a shard knows when it has heard all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.protocol import ActivationFormat, Activations
from .exchange import ExchangePoint, Received, Sent
from .expert_routes import ExpertRoutes
from .link import LinkError
from .pair_split import split_pairs
from .zmq_end import ZmqEnd
from .zmq_mail import DTYPES, ExchangeHeader

_NO_SCALES = np.zeros(0, np.float32)


@dataclass(frozen=True)
class _Dispatched:
    """One shard's dispatch to this one: values [R, D] as numpy sees them, scale [R] or none, pairs [P]."""

    values: np.ndarray
    scale: np.ndarray
    pair_row: np.ndarray
    pair_expert: np.ndarray
    format: ActivationFormat


class ZmqExchange(ZmqEnd):
    """Rows go to their experts, outputs come back."""

    def __init__(self, engine: str, epoch: int, routes: ExpertRoutes, hidden_size: int, timeout_s: float) -> None:
        super().__init__(engine, epoch, routes, hidden_size, timeout_s)
        self._held = len(routes.slots[routes.shard])
        self._own_dispatch: dict[ExchangePoint, _Dispatched] = {}

    def begin_step(self, step: int) -> None:
        self._mail.begin_step(step)

    def dispatch(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Sent:
        tokens, slots = ids.shape
        values = _numpy(activations.values)
        scale = None if activations.scale is None else activations.scale.numpy()
        parts = split_pairs(self._routes.route_array(point.layer, ids.numpy()), self._first)
        for shard, pairs in enumerate(parts):
            scales = _NO_SCALES if scale is None else scale[pairs.tokens]
            part = _Dispatched(values[pairs.tokens], scales, pairs.pair_row, pairs.pair_expert, activations.format)
            self._hand_over(point, shard, part)
        return Sent(tokens, slots, tuple(pairs.positions for pairs in parts))

    def receive_dispatch(self, point: ExchangePoint) -> Received:
        self._mail.wait(point, "dispatch", self._mail.peers)
        parts = [
            self._own_dispatch.pop(point) if shard == self._shard else self._open_dispatch(point, shard)
            for shard in range(len(self._first))
        ]
        # A shard without pairs here may bear any format; those with pairs all bear the layer's.
        busy = [part for part in parts if len(part.pair_row)] or parts[:1]
        kind = busy[0].format
        if any(part.format is not kind for part in busy):
            raise LinkError(f"layer {point.layer}: shards dispatched different activation formats")
        pair_rows, rows = [], 0
        for part in busy:
            pair_rows.append(part.pair_row + np.int32(rows))
            rows += len(part.values)
        values = torch.from_numpy(np.concatenate([part.values for part in busy])).view(DTYPES[kind])
        scale = torch.from_numpy(np.concatenate([part.scale for part in busy]))
        return Received(
            Activations(kind, values, None if kind is ActivationFormat.FLOAT else scale),
            torch.from_numpy(np.concatenate(pair_rows)),
            torch.from_numpy(np.concatenate([part.pair_expert for part in busy])),
            tuple(len(part.pair_row) for part in parts),
        )

    def send_back(self, point: ExchangePoint, received: Received, outputs: Tensor) -> None:
        rows = outputs.numpy()
        end = 0
        for shard, pairs in enumerate(received.pairs):
            begin, end = end, end + pairs
            if not pairs:  # nobody will ask for them
                continue
            if shard == self._shard:
                self._own_outputs[point] = rows[begin:end]
            else:
                self._mail.send([shard], point, "combine", [rows[begin:end]], self._hidden_size, pairs=pairs)

    def _hand_over(self, point: ExchangePoint, shard: int, part: _Dispatched) -> None:
        if shard == self._shard:
            self._own_dispatch[point] = part
            return
        arrays = [part.scale, part.pair_row, part.pair_expert, part.values]
        rows, pairs = len(part.values), len(part.pair_row)
        self._mail.send([shard], point, "dispatch", arrays, self._hidden_size, rows, pairs, part.format)

    def _fits(self, header: ExchangeHeader) -> bool:
        return header.phase in ("dispatch", "combine") and header.columns == self._hidden_size

    def _open_dispatch(self, point: ExchangePoint, sender: int) -> _Dispatched:
        header, payload = self._mail.take(point, "dispatch", sender)
        kind = ActivationFormat(header.format)
        scales = 0 if kind is ActivationFormat.FLOAT else header.rows
        pairs_at = 4 * scales
        values_at = pairs_at + 8 * header.pairs
        pair_row, pair_expert = np.frombuffer(payload[pairs_at:values_at], np.int32).reshape(2, -1)
        values = np.frombuffer(payload[values_at:], _numpy_dtype(kind)).reshape(-1, self._hidden_size)
        part = _Dispatched(values, np.frombuffer(payload[:pairs_at], np.float32), pair_row, pair_expert, kind)
        # The kernels index with these numbers, in C++: a wrong one must not reach them.
        if header.pairs and not (
            part.pair_row.min() >= 0
            and part.pair_row.max() < header.rows
            and part.pair_expert.min() >= 0
            and part.pair_expert.max() < self._held
        ):
            raise LinkError(f"shard {sender} sent pairs of layer {point.layer} that name no row or expert here")
        return part


def _numpy(values: Tensor) -> np.ndarray:
    """A view that numpy knows; FP8 as its bytes."""
    return values.view(torch.uint8).numpy() if values.dtype == torch.float8_e4m3fn else values.numpy()


def _numpy_dtype(kind: ActivationFormat) -> type[np.generic]:
    return {ActivationFormat.FLOAT: np.float32, ActivationFormat.INT8: np.int8, ActivationFormat.FP8: np.uint8}[kind]
