"""Messages between shard processes over ZeroMQ: a socket that all peers push into, and what has come by it."""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import zmq

from ..kernels.protocol import ActivationFormat
from .exchange import ExchangePoint
from .link import LinkError, LinkPlace, Links
from .wire import WireError, decode_as, encode, message

_LENGTH = struct.Struct("<H")
DTYPES = {
    ActivationFormat.FLOAT: torch.float32,
    ActivationFormat.INT8: torch.int8,
    ActivationFormat.FP8: torch.float8_e4m3fn,
}


@message(version=2)
@dataclass(frozen=True)
class ExchangeHeader:
    """Begins a message between shards; raw little-endian arrays follow it. phase: "dispatch", "combine", "heads" or
    "logits".

    dispatch: scales [rows] f32 (none for "float"), the pairs' rows [pairs] i32, the receiver's slots [pairs]
    i32, and the activations [rows, columns] in `format`. combine: outputs [pairs, columns] f32. heads, logits: the
    sender's columns [rows, columns] f32.
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
        if self.phase in ("heads", "logits"):
            return self.rows * self.columns * 4
        if self.phase == "combine":
            return self.pairs * self.columns * 4
        if self.phase != "dispatch":
            raise ValueError(f"unknown phase {self.phase!r}")
        kind = ActivationFormat(self.format)
        scales = 0 if kind is ActivationFormat.FLOAT else self.rows * 4
        return scales + 2 * self.pairs * 4 + self.rows * self.columns * DTYPES[kind].itemsize


Letter = tuple[ExchangeHeader, memoryview]


class ZmqMail:
    """One shard's end of the links to its peers.

    A peer may be one phase ahead, so messages are kept by (point, phase, sender), in the order of sending, until they
    are asked for. When one of the sockets `interrupts` becomes readable, the shard is to stop: waiting then ends with
    `LinkError`. A message of another engine or epoch, or one that makes no sense, is dropped and counted.
    """

    def __init__(
        self,
        engine: str,
        epoch: int,
        shard: int,
        shards: int,
        timeout_s: float,
        fits: Callable[[ExchangeHeader], bool],
    ) -> None:
        """fits: whether a message is one that this shard could be sent."""
        self.dropped = 0
        self.peers = [peer for peer in range(shards) if peer != shard]
        self._engine, self._epoch, self._shard = engine, epoch, shard
        self._timeout_s, self._fits = timeout_s, fits
        self._letters: dict[tuple[ExchangePoint, str, int], deque[Letter]] = {}
        self._push: dict[int, zmq.Socket] = {}

    def open(self, links: Links, place: LinkPlace) -> str:
        """Binds the socket that peers push into; returns its address."""
        self._pull, address = links.bind(zmq.PULL, place, f"exchange-{self._epoch}-{self._shard}")
        self._poller = zmq.Poller()
        self._poller.register(self._pull, zmq.POLLIN)
        return address

    def connect(self, links: Links, addresses: Sequence[str], interrupts: Sequence[zmq.Socket] = ()) -> None:
        """Connects to all peers, `addresses` in shard order. interrupts: see the class."""
        for socket in interrupts:
            self._poller.register(socket, zmq.POLLIN)
        for peer in self.peers:
            self._push[peer] = links.connect(zmq.PUSH, addresses[peer])
            self._push[peer].sndtimeo = round(self._timeout_s * 1000)

    def begin_step(self, step: int) -> None:
        """Drops what was never asked for in earlier steps."""
        for key in [key for key in self._letters if key[0].step < step]:
            self.dropped += len(self._letters.pop(key))

    def send(
        self,
        peers: Sequence[int],
        point: ExchangePoint,
        phase: str,
        arrays: Sequence[np.ndarray],
        columns: int,
        rows: int = 0,
        pairs: int = 0,
        format: ActivationFormat = ActivationFormat.FLOAT,
    ) -> None:
        """Sends the same to each of these peers. Raises LinkError for one that does not take it."""
        begin = encode(
            ExchangeHeader(
                self._engine,
                self._epoch,
                point.step,
                point.layer,
                point.micro_batch,
                phase,
                self._shard,
                rows,
                pairs,
                columns,
                format.value,
            )
        )
        message = b"".join((_LENGTH.pack(len(begin)), begin, *map(np.ndarray.tobytes, arrays)))
        for peer in peers:
            try:
                self._push[peer].send(message)
            except zmq.Again:
                raise LinkError(
                    f"layer {point.layer}: shard {peer} took no {phase} message within {self._timeout_s:g} s"
                ) from None

    def take(self, point: ExchangePoint, phase: str, sender: int) -> Letter:
        """The first message of a peer, for which `wait` has waited."""
        key = point, phase, sender
        letters = self._letters[key]
        letter = letters.popleft()
        if not letters:
            del self._letters[key]
        return letter

    def wait(self, point: ExchangePoint, phase: str, peers: Sequence[int]) -> None:
        """Reads messages until one of each of `peers` is there."""
        missing = [peer for peer in peers if (point, phase, peer) not in self._letters]
        deadline = time.monotonic() + self._timeout_s
        while missing:
            ready = dict(self._poller.poll(max(0, round((deadline - time.monotonic()) * 1000))))
            if any(socket is not self._pull for socket in ready):
                raise LinkError(f"layer {point.layer}: told to stop while waiting for the {phase} of {_names(missing)}")
            if not ready:
                raise LinkError(
                    f"layer {point.layer}: no {phase} message from {_names(missing)} within {self._timeout_s:g} s"
                )
            self._read()
            missing = [peer for peer in missing if (point, phase, peer) not in self._letters]

    def _read(self) -> None:
        message = memoryview(self._pull.recv())
        try:
            (length,) = _LENGTH.unpack_from(message)
            header = decode_as(bytes(message[_LENGTH.size : _LENGTH.size + length]), ExchangeHeader)
            size = header.payload_bytes()
        except (WireError, ValueError, struct.error):
            self.dropped += 1
            return
        payload = message[_LENGTH.size + length :]
        known = header.engine == self._engine and header.epoch == self._epoch and header.sender in self.peers
        if not known or not self._fits(header) or len(payload) != size:
            self.dropped += 1
            return
        self._letters.setdefault((header.point(), header.phase, header.sender), deque()).append((header, payload))


def _names(shards: Sequence[int]) -> str:
    return ", ".join(f"shard {shard}" for shard in shards)
