"""Processes that stand still while a test looks at what they would soon have changed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def standing(pid: int) -> Iterator[None]:
    """The process stands still meanwhile: nothing that needs it can be over before it has been looked at."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
