"""The router's end of its links to the shards: one socket a shard, and who is gone."""

from __future__ import annotations

import time
from collections.abc import Iterable

import zmq

from .engine_error import EngineError
from .link import LinkPlace, Links
from .step_plan import StepPlan, StepResult
from .wire import WireError, decode_as, encode

# A shard that has connected says so in a result of this step.
HELLO = -1


class ShardLost(EngineError):
    """A shard's process or node is gone, or does not take plans any more, or a step failed there.

    shards: those that it seems to be.
    """

    def __init__(self, message: str, shards: Iterable[int]) -> None:
        super().__init__(message)
        self.shards = frozenset(shards)


class ShardGroup:
    """Sends plans to all shards and gathers their results. Used by the router's loop thread alone.

    A socket a shard, so that a lost connection names its shard: a Unix socket closes with its process, a TCP socket
    also when its peer is silent (`Links`).
    """

    def __init__(
        self, links: Links, place: LinkPlace, shards: int, engine: str, epoch: int, alike: bool = False
    ) -> None:
        """alike: all shards run the same plan, and the first one answers; the others say that they are done."""
        self.dropped = 0
        self._alike = alike
        self._engine, self._epoch = engine, epoch
        self._sockets: list[zmq.Socket] = []
        self._monitors: list[zmq.Socket] = []
        self.addresses: list[str] = []
        for shard in range(shards):
            socket, address = links.bind(zmq.DEALER, place, f"plan-{epoch}-{shard}")
            socket.sndtimeo = 0  # a queue of plans that nobody reads is a lost shard, nothing to wait for
            self._sockets.append(socket)
            self._monitors.append(socket.get_monitor_socket(zmq.EVENT_DISCONNECTED))
            self.addresses.append(address)

    def await_shards(self, timeout_s: float) -> None:
        """Waits until every shard is connected: its first message is a result of step -1. Raises ShardLost."""
        deadline = time.monotonic() + timeout_s
        for shard, socket in enumerate(self._sockets):
            result = None
            while result is None or result.step != HELLO:
                if not socket.poll(max(0, round((deadline - time.monotonic()) * 1000))):
                    raise ShardLost(f"shard {shard} did not connect to the router within {timeout_s:g} s", [shard])
                result = self._read(socket, shard)

    def told(self, results: list[StepResult]) -> list[StepResult]:
        """Of the results of all shards those that answer plans."""
        return [result for result in results if not self._alike or result.shard == 0]

    def register(self, poller: zmq.Poller) -> None:
        """Adds the sockets to a poller that wakes up the loop."""
        for socket in (*self._sockets, *self._monitors):
            poller.register(socket, zmq.POLLIN)

    def unregister(self, poller: zmq.Poller) -> None:
        """Takes them out again, once the shards are given up."""
        for socket in (*self._sockets, *self._monitors):
            poller.unregister(socket)

    def send(self, plans: dict[int, StepPlan]) -> None:
        """Sends each shard its plan, or all the one there is. Raises ShardLost."""
        messages = {shard: encode(plan) for shard, plan in plans.items()}
        if self._alike:
            messages = dict.fromkeys(range(len(self._sockets)), messages[0])
        for shard, message in messages.items():
            try:
                self._sockets[shard].send(message)
            except zmq.ZMQError as error:
                raise ShardLost(f"shard {shard} takes no plans: {error}", [shard]) from error

    def receive(self, ready: dict[zmq.Socket, int]) -> list[StepResult]:
        """The results that have come, at most one a shard, for the poller tells of more. Raises ShardLost if a
        connection is gone."""
        results = []
        for shard, (socket, monitor) in enumerate(zip(self._sockets, self._monitors, strict=True)):
            if socket in ready:
                result = self._read(socket, shard)
                if result is not None:
                    results.append(result)
            if monitor in ready:
                raise ShardLost(f"shard {shard} is gone: its connection closed", [shard])
        return results

    def close(self) -> None:
        """Ends the monitors; the sockets close with their links."""
        for socket in self._sockets:
            socket.disable_monitor()

    def _read(self, socket: zmq.Socket, shard: int) -> StepResult | None:
        """The message that has come, unless it is to be dropped."""
        try:
            result = decode_as(socket.recv(zmq.NOBLOCK), StepResult)
            if (result.engine, result.epoch, result.shard) == (self._engine, self._epoch, shard):
                return result
        except WireError:
            pass
        self.dropped += 1
        return None
