"""A TCP port that is kept for a server which starts later."""

from __future__ import annotations

import socket
from types import TracebackType


class HeldPort:
    """A TCP port of this machine that the kernel gives to nobody else while it is held.

    Nobody is answered there until a server listens: one that names the port, and sets SO_REUSEADDR as servers do, can.
    A number that is free now and not held may be another process's, even its end of a connection, when the server is
    up. number: the port.
    """

    def __init__(self, host: str = "", port: int = 0) -> None:
        """port: 0 for one that nobody uses. Raises OSError if somebody listens there, or nobody could."""
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
        except BaseException:
            self._socket.close()
            raise
        self.number: int = self._socket.getsockname()[1]

    def __enter__(self) -> HeldPort:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Holds it no longer. May be called twice."""
        self._socket.close()
