"""One opened CPU library: its thread pool and its instruction-set variant."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .arena import Arena
from .commands import WORD
from .library import LibraryError, load_library

if TYPE_CHECKING:
    from .graph import Recording

_OUT_OF_MEMORY = 2


class CpuHandle:
    """threads: how many compute at once, the caller included. variant: "amx", "avx512", "avx2", "portable", or "" for
    the best that this CPU runs. Calls from several Python threads are safe and share the pool. Not usable in a forked
    child."""

    def __init__(self, threads: int, variant: str = "") -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1")
        self.library = load_library()
        self._handle = self.library.flyray_open(threads, variant.encode())
        if not self._handle:
            raise LibraryError(f"CPU kernels do not start: {self.library.flyray_error().decode()}")
        self._close = weakref.finalize(self, _close, self.library, self._handle, os.getpid())
        # At the end of the process its threads end too.
        self._close.atexit = False
        self._call = self.library.flyray_run
        self.threads = threads
        self.thread = _Thread()
        self.variant: str = self.library.flyray_variant(self._handle).decode()

    def close(self) -> None:
        """Ends the thread pool; no operation may run then or later. Also done when the object goes."""
        self._handle = None
        self._close()

    def run(self, words: bytes) -> None:
        """Runs operations in the words of `commands` on the pool; what the library refuses is a ValueError."""
        if self._handle is None:
            raise LibraryError("these CPU kernels are closed")
        code = self._call(self._handle, words, len(words) // WORD)
        if code:
            message = self.library.flyray_error().decode()
            raise MemoryError(message) if code == _OUT_OF_MEMORY else ValueError(message)

    @contextmanager
    def recording(self, recording: Recording) -> Iterator[None]:
        """What this thread computes meanwhile belongs to a graph."""
        if self.thread.recording is not None:
            raise ValueError("a capture runs in this thread already; captures do not nest")
        self.thread.recording = recording
        try:
            yield
        finally:
            self.thread.recording = None


class _Thread(threading.local):
    """recording: of what runs in this thread, or None. arena: of what it joins."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.arena = Arena()


def _close(library: ctypes.CDLL, handle: int, process: int) -> None:
    """Joins the pool's threads, which a forked child does not have."""
    if os.getpid() == process:
        library.flyray_close(handle)
