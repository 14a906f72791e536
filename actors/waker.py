"""Wakes a thread that waits for sockets, from any other thread."""

from __future__ import annotations

import threading

import zmq


class Waker:
    """socket: what the thread polls beside its own; readable from `wake` on, until `take`.

    The thread that polls makes and closes it; the others may call `wake` at any time, also when it is closed.
    """

    def __init__(self, context: zmq.Context, name: str) -> None:
        """name: differs from all others of the context."""
        self.socket = context.socket(zmq.PULL)
        self.socket.bind(f"inproc://{name}")
        self._lock = threading.Lock()
        self._push = context.socket(zmq.PUSH)
        self._push.connect(f"inproc://{name}")

    def wake(self) -> None:
        """Wakes the thread, if it still waits."""
        with self._lock:
            if not self._push.closed and self._push.poll(0, zmq.POLLOUT):  # else a thousand calls are to be taken yet
                self._push.send(b"")

    def take(self) -> None:
        """Takes one call back; there must be one."""
        self.socket.recv()

    def close(self) -> None:
        """From now on `wake` does nothing; the context may end."""
        with self._lock:
            self._push.close()
            self.socket.close()
