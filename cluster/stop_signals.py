"""SIGINT and SIGTERM: the first one asks to end, the next one ends at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asks to end.

    A KeyboardInterrupt, because a wait in Ray's core ends for no other exception of a handler: it goes on, and fails
    with a SystemError when it is over. From there it comes as a plain KeyboardInterrupt, so that is what to catch.
    """


class StopSignals:
    """While entered, the first signal raises Stopped in the main thread.

    After that, or after `closing`, a signal calls `end_now` and leaves the process without any further word.
    """

    def __init__(self, end_now: Callable[[], None]) -> None:
        self._end_now = end_now
        self._asked = False
        self._before: list[object] = []

    def __enter__(self) -> StopSignals:
        self._before = [signal.getsignal(number) for number in _NUMBERS]
        self.arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in zip(_NUMBERS, self._before, strict=True):
            signal.signal(number, handler)  # type: ignore[arg-type]

    def arm(self) -> None:
        """Sets the handlers, also again after a library has set its own."""
        for number in _NUMBERS:
            signal.signal(number, self._handle)

    def disarm(self) -> None:
        """SIGINT is a KeyboardInterrupt again, for what runs in the foreground; SIGTERM still asks to end."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @staticmethod
    def wait() -> NoReturn:
        """Until a signal ends it. Not `signal.pause`: a signal that comes just before that, or to another thread, would
        not end it, for Python's handler runs behind the call."""
        while True:
            time.sleep(1.0)

    def closing(self) -> None:
        """What runs now is the end already; a signal must not break it off halfway."""
        self._asked = True
        self.arm()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._asked:
            self._end_now()
            os._exit(128 + number)
        self._asked = True
        raise Stopped
