"""How the processes of one engine reach each other: ZeroMQ over Unix sockets or over TCP with CURVE keys.

On one node the sockets are files in a folder that only this user may enter. Between nodes every connection is
encrypted, and both ends prove that they hold the engine's keys, which travel through Ray. What is sent is msgpack of
known types (`wire`) and raw tensor bytes, never pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import zmq
from zmq.auth.thread import ThreadAuthenticator

from .engine_error import EngineError

# Messages queued for one peer. A plan is answered before the next one is sent, and an exchange is at most one phase
# ahead of its receiver, so a full queue there means a peer that stopped reading: sending then waits, up to the timeout.
PEER_QUEUE = 64
# A client gets one message a step. One that reads nothing for this many steps is dropped by the router.
CLIENT_QUEUE = 10_000


class LinkError(EngineError):
    """A socket could not be opened, or a peer did not answer in time."""


@dataclass(frozen=True)
class LinkKeys:
    """CURVE keys of one engine, Z85 text of 40 bytes each.

    Whoever binds a socket proves `server_secret`, whoever connects proves `client_secret`; clients get a copy without
    the server's secret (`for_client`).
    """

    server_public: bytes
    client_public: bytes
    client_secret: bytes = field(repr=False)
    server_secret: bytes = field(repr=False, default=b"")

    @classmethod
    def create(cls) -> LinkKeys:
        """New random keys."""
        server_public, server_secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        return cls(server_public, client_public, client_secret, server_secret)

    def for_client(self) -> LinkKeys:
        """The same keys without the server's secret: enough to connect, not to bind."""
        return replace(self, server_secret=b"")


@dataclass(frozen=True)
class LinkPlace:
    """Where sockets are bound: a private folder (Unix sockets) or a host's address (TCP); the other one is empty."""

    folder: str = ""
    host: str = ""

    def __post_init__(self) -> None:
        if bool(self.folder) == bool(self.host):
            raise ValueError(f"a link place is a folder or a host, got folder={self.folder!r} host={self.host!r}")


@dataclass(frozen=True)
class ProcessPlace:
    """Where a process runs: Ray's id of the node, the node's address as others reach it, the process's number there."""

    node: str
    host: str
    pid: int


def needs_tcp(transport: str, places: Sequence[ProcessPlace]) -> bool:
    """Whether processes at these places must talk over TCP. Raises LinkError if "ipc" is asked for and cannot be."""
    nodes = sorted({place.node for place in places})
    if transport == "ipc" and len(nodes) > 1:
        raise LinkError(f"transport: ipc reaches one node, the engine's processes are on {len(nodes)}: {nodes}")
    return transport == "tcp" or len(nodes) > 1


class _EngineMembers:
    """Admits the one client key of the engine."""

    def __init__(self, keys: LinkKeys) -> None:
        self._client = keys.client_public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._client


class Links:
    """The sockets of one process in one engine. With keys every socket is encrypted and checks its peer.

    Sockets do not linger: what is unsent when they close is dropped, for it belongs to an engine that ended.
    """

    def __init__(self, keys: LinkKeys | None, silence_s: float = 0.0) -> None:
        """silence_s: a TCP peer that is silent for so long is taken for gone and disconnected (0: never).

        ZeroMQ's own thread sends and answers these heartbeats, so a peer that computes is not taken for gone. One that
        stands still as a whole is, and takes others for gone when it wakes, for it looks at the clock before it reads
        what they answered. Unix sockets need none: the kernel closes them with their process.
        """
        self.keys = keys
        self._silence_ms = round(silence_s * 1000)
        self.context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None

    def bind(
        self, kind: int, place: LinkPlace, name: str, queue: int = PEER_QUEUE, largest: int = -1
    ) -> tuple[zmq.Socket, str]:
        """A bound socket of `kind` (zmq.DEALER, …) and the address that others connect to.

        largest: bytes of a message; a peer that sends more is disconnected (-1: any size).
        """
        socket = self._socket(kind, queue)
        socket.maxmsgsize = largest
        if place.host:
            self._notice_silence(socket)
        if self.keys is not None:
            self._admit_members(self.keys)
            socket.curve_server = True
            socket.curve_secretkey = self.keys.server_secret
            socket.curve_publickey = self.keys.server_public
        wanted = f"ipc://{place.folder}/{name}" if place.folder else f"tcp://{_bracketed(place.host)}:*"
        try:
            socket.bind(wanted)
        except zmq.ZMQError as error:
            socket.close()
            raise LinkError(f"{wanted}: cannot bind: {error}") from error
        return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(
        self, kind: int, address: str, queue: int = PEER_QUEUE, identity: bytes = b"", events: int = 0
    ) -> zmq.Socket:
        """A socket of `kind` connected to `address`; ZeroMQ connects in the background and again after a loss.

        events: what the socket's `get_monitor_socket()` tells (zmq.EVENT_…). It must listen before the socket connects,
        which may take less time than the caller's next line.
        """
        socket = self._socket(kind, queue)
        if events:
            socket.get_monitor_socket(events)
        if identity:
            socket.routing_id = identity
        if address.startswith("tcp:"):
            self._notice_silence(socket)
        if self.keys is not None:
            socket.curve_serverkey = self.keys.server_public
            socket.curve_secretkey = self.keys.client_secret
            socket.curve_publickey = self.keys.client_public
        socket.connect(address)
        return socket

    def close(self, linger_ms: int = 0) -> None:
        """Closes every socket, after `linger_ms` at most for what is unsent, and ZeroMQ's threads. May be repeated."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self.context.destroy(linger=linger_ms)

    def _socket(self, kind: int, queue: int) -> zmq.Socket:
        socket = self.context.socket(kind)
        socket.linger = 0
        socket.set_hwm(queue)
        return socket

    def _notice_silence(self, socket: zmq.Socket) -> None:
        if self._silence_ms:
            socket.heartbeat_ivl = max(self._silence_ms // 5, 1)
            socket.heartbeat_timeout = self._silence_ms

    def _admit_members(self, keys: LinkKeys) -> None:
        if not keys.server_secret:
            raise LinkError("these keys are a client's: they can connect but not bind")
        if self._authenticator is None:
            authenticator = ThreadAuthenticator(self.context)
            authenticator.start()
            authenticator.configure_curve_callback("*", _EngineMembers(keys))
            self._authenticator = authenticator


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
