"""The exchange between shard processes over ZeroMQ.

Every peer gets a message in every dispatch, also an empty one, so that a shard knows when it has heard all. A message
of another engine or epoch, or one that makes no sense, is dropped and counted.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import zmq
from torch import Tensor

from ..kernels.protocol import ActivationFormat, Activations
from .exchange import ExchangePoint, Received, Sent
from .link import LinkError, LinkPlace, Links
from .pair_split import split_pairs
from .wire import WireError, decode_as, encode, message

_LENGTH = struct.Struct("<H")
_NO_SCALES = np.zeros(0, np.float32)
_DTYPES = {
    ActivationFormat.FLOAT: torch.float32,
    ActivationFormat.INT8: torch.int8,
    ActivationFormat.FP8: torch.float8_e4m3fn,
}


@message(version=1)
@dataclass(frozen=True)
class ExchangeHeader:
    """Begins a message between shards; raw little-endian arrays follow it. phase: "dispatch" or "combine".

    dispatch: scales [rows] f32 (none for "float"), the pairs' rows [pairs] i32, the receiver's expert numbers [pairs]
    i32, and the activations [rows, columns] in `format`. combine: outputs [pairs, columns] f32.
    """

    engine: str
    epoch: int
    step: int
    layer: int
    micro_batch: int
    phase: str
    sender: int
    rows: int
    pairs: int
    columns: int
    format: str

    def point(self) -> ExchangePoint:
        """The exchange that the message belongs to."""
        return ExchangePoint(self.step, self.layer, self.micro_batch)

    def payload_bytes(self) -> int:
        """The size of the arrays. ValueError for a phase or format that is unknown or numbers below 0."""
        if min(self.rows, self.pairs, self.columns) < 0:
            raise ValueError("sizes below 0")
        if self.phase == "combine":
            return self.pairs * self.columns * 4
        if self.phase != "dispatch":
            raise ValueError(f"unknown phase {self.phase!r}")
        kind = ActivationFormat(self.format)
        scales = 0 if kind is ActivationFormat.FLOAT else self.rows * 4
        return scales + 2 * self.pairs * 4 + self.rows * self.columns * _DTYPES[kind].itemsize


@dataclass(frozen=True)
class _Dispatched:
    """One shard's dispatch to this one: values [R, D] as numpy sees them, scale [R] or none, pairs [P]."""

    values: np.ndarray
    scale: np.ndarray
    pair_row: np.ndarray
    pair_expert: np.ndarray
    format: ActivationFormat


class ZmqExchange:
    """Peer to peer between shard processes over ZeroMQ: a PULL socket that all peers push into.

    A peer may be one phase ahead, so messages are kept by (point, phase, sender) until they are asked for. When one of
    the sockets `interrupts` becomes readable, the shard is to stop: waiting then ends with `LinkError`.
    """

    captures = False

    def __init__(
        self,
        engine: str,
        epoch: int,
        shard: int,
        experts: Sequence[range],
        hidden_size: int,
        timeout_s: float,
    ) -> None:
        """experts: the contiguous experts of every shard, in shard order. hidden_size: D of every row."""
        self.dropped = 0
        self._engine, self._epoch, self._shard = engine, epoch, shard
        self._columns = hidden_size
        self._timeout_s = timeout_s
        self._first = np.array([held.start for held in experts], dtype=np.int32)
        self._held = np.array([len(held) for held in experts], dtype=np.int32)
        self._peers = [peer for peer in range(len(experts)) if peer != shard]
        self._mail: dict[tuple[ExchangePoint, str, int], tuple[ExchangeHeader, memoryview]] = {}
        self._own_dispatch: dict[ExchangePoint, _Dispatched] = {}
        self._own_outputs: dict[ExchangePoint, np.ndarray] = {}
        self._push: dict[int, zmq.Socket] = {}

    def open(self, links: Links, place: LinkPlace) -> str:
        """Binds the socket that peers push into; returns its address."""
        self._pull, address = links.bind(zmq.PULL, place, f"exchange-{self._shard}")
        self._poller = zmq.Poller()
        self._poller.register(self._pull, zmq.POLLIN)
        return address

    def connect(self, links: Links, addresses: Sequence[str], interrupts: Sequence[zmq.Socket] = ()) -> None:
        """Connects to all peers, `addresses` in shard order. interrupts: see the class."""
        for socket in interrupts:
            self._poller.register(socket, zmq.POLLIN)
        for peer in self._peers:
            self._push[peer] = links.connect(zmq.PUSH, addresses[peer])
            self._push[peer].sndtimeo = round(self._timeout_s * 1000)

    def begin_step(self, step: int) -> None:
        for key in [key for key in self._mail if key[0].step < step]:
            del self._mail[key]
            self.dropped += 1

    def dispatch(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Sent:
        tokens, slots = ids.shape
        values = _numpy(activations.values)
        scale = None if activations.scale is None else activations.scale.numpy()
        parts = split_pairs(ids.numpy(), self._first)
        for shard, pairs in enumerate(parts):
            scales = _NO_SCALES if scale is None else scale[pairs.tokens]
            part = _Dispatched(values[pairs.tokens], scales, pairs.pair_row, pairs.pair_expert, activations.format)
            self._hand_over(point, shard, part)
        return Sent(tokens, slots, tuple(pairs.positions for pairs in parts))

    def receive_dispatch(self, point: ExchangePoint) -> Received:
        self._await(point, "dispatch", self._peers)
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
        values = torch.from_numpy(np.concatenate([part.values for part in busy])).view(_DTYPES[kind])
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
                header = self._header(point, "combine", 0, pairs, ActivationFormat.FLOAT)
                self._send(shard, header, [rows[begin:end]])

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        owing = [peer for peer in self._peers if len(sent.positions[peer])]
        self._await(point, "combine", owing)
        slots = np.empty((sent.tokens * sent.slots, self._columns), np.float32)
        own = sent.positions[self._shard]
        if len(own):
            slots[own] = self._own_outputs.pop(point)
        for peer in owing:
            header, payload = self._mail.pop((point, "combine", peer))
            asked = len(sent.positions[peer])
            if header.pairs != asked:
                raise LinkError(f"layer {point.layer}: shard {peer} answered {header.pairs} pairs, {asked} were sent")
            slots[sent.positions[peer]] = np.frombuffer(payload, np.float32).reshape(-1, self._columns)
        return torch.from_numpy(slots).view(sent.tokens, sent.slots, self._columns)

    def _hand_over(self, point: ExchangePoint, shard: int, part: _Dispatched) -> None:
        if shard == self._shard:
            self._own_dispatch[point] = part
            return
        header = self._header(point, "dispatch", len(part.values), len(part.pair_row), part.format)
        self._send(shard, header, [part.scale, part.pair_row, part.pair_expert, part.values])

    def _header(
        self, point: ExchangePoint, phase: str, rows: int, pairs: int, format: ActivationFormat
    ) -> ExchangeHeader:
        return ExchangeHeader(
            self._engine,
            self._epoch,
            point.step,
            point.layer,
            point.micro_batch,
            phase,
            self._shard,
            rows,
            pairs,
            self._columns,
            format.value,
        )

    def _send(self, peer: int, header: ExchangeHeader, arrays: list[np.ndarray]) -> None:
        begin = encode(header)
        message = b"".join((_LENGTH.pack(len(begin)), begin, *map(np.ndarray.tobytes, arrays)))
        try:
            self._push[peer].send(message)
        except zmq.Again:
            raise LinkError(
                f"layer {header.layer}: shard {peer} took no {header.phase} message within {self._timeout_s:g} s"
            ) from None

    def _await(self, point: ExchangePoint, phase: str, peers: Sequence[int]) -> None:
        """Reads messages until those of `peers` are in the mail."""
        missing = [peer for peer in peers if (point, phase, peer) not in self._mail]
        deadline = time.monotonic() + self._timeout_s
        while missing:
            ready = dict(self._poller.poll(max(0, round((deadline - time.monotonic()) * 1000))))
            if any(socket is not self._pull for socket in ready):
                raise LinkError(f"layer {point.layer}: told to stop while waiting for the {phase} of {_names(missing)}")
            if not ready:
                raise LinkError(
                    f"layer {point.layer}: no {phase} message from {_names(missing)} within {self._timeout_s:g} s"
                )
            self._read_message()
            missing = [peer for peer in missing if (point, phase, peer) not in self._mail]

    def _read_message(self) -> None:
        message = memoryview(self._pull.recv())
        try:
            (length,) = _LENGTH.unpack_from(message)
            header = decode_as(bytes(message[_LENGTH.size : _LENGTH.size + length]), ExchangeHeader)
            size = header.payload_bytes()
        except (WireError, ValueError, struct.error):
            self.dropped += 1
            return
        payload = message[_LENGTH.size + length :]
        known = header.engine == self._engine and header.epoch == self._epoch and header.sender in self._peers
        if not known or header.columns != self._columns or len(payload) != size:
            self.dropped += 1
            return
        self._mail[header.point(), header.phase, header.sender] = header, payload

    def _open_dispatch(self, point: ExchangePoint, sender: int) -> _Dispatched:
        header, payload = self._mail.pop((point, "dispatch", sender))
        kind = ActivationFormat(header.format)
        scales = 0 if kind is ActivationFormat.FLOAT else header.rows
        pairs_at = 4 * scales
        values_at = pairs_at + 8 * header.pairs
        pair_row, pair_expert = np.frombuffer(payload[pairs_at:values_at], np.int32).reshape(2, -1)
        values = np.frombuffer(payload[values_at:], _numpy_dtype(kind)).reshape(-1, self._columns)
        part = _Dispatched(values, np.frombuffer(payload[:pairs_at], np.float32), pair_row, pair_expert, kind)
        # The kernels index with these numbers, in C++: a wrong one must not reach them.
        if header.pairs and not (
            part.pair_row.min() >= 0
            and part.pair_row.max() < header.rows
            and part.pair_expert.min() >= 0
            and part.pair_expert.max() < self._held[self._shard]
        ):
            raise LinkError(f"shard {sender} sent pairs of layer {point.layer} that name no row or expert here")
        return part


def _numpy(values: Tensor) -> np.ndarray:
    """A view that numpy knows; FP8 as its bytes."""
    return values.view(torch.uint8).numpy() if values.dtype == torch.float8_e4m3fn else values.numpy()


def _numpy_dtype(kind: ActivationFormat) -> type[np.generic]:
    return {ActivationFormat.FLOAT: np.float32, ActivationFormat.INT8: np.int8, ActivationFormat.FP8: np.uint8}[kind]


def _names(shards: Sequence[int]) -> str:
    return ", ".join(f"shard {shard}" for shard in shards)
