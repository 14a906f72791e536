"""Temporary folders for Quark's input and output, which a killed process leaves to the next one to remove."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path


class StagingFolder:
    """A context manager that makes an empty folder and removes it at the end; `path` is None before and after.

    It lies below the system's temporary folder (TMPDIR), not in shared memory: what is staged lives for seconds, so
    that most of it is deleted before the disk sees it, and writing it takes a few percent of the time that rounding
    does. In shared memory it would count against the worker's memory, and what a killed process leaves behind would
    be missing until the machine restarts. A folder is held by a file lock that dies with its process: every new
    folder first removes those that nobody holds.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """parent: where to make it; default: a folder of this user's below the system's temporary folder."""
        self._parent = parent or Path(tempfile.gettempdir(), f"flyray-quark-{os.getuid()}")
        self.path: Path | None = None

    def __enter__(self) -> Path:
        self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Under one lock, so that no folder is taken for left behind between being made and being held.
        guard = _locked(self._parent / "lock")
        try:
            self._remove_left_behind()
            self.path = Path(tempfile.mkdtemp(dir=self._parent))
            self._held = _locked(self.path / "lock")
        finally:
            os.close(guard)
        return self.path

    def __exit__(self, *error: object) -> None:
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._held)
            self.path = None

    def _remove_left_behind(self) -> None:
        for folder in self._parent.iterdir():
            if folder.is_dir() and _is_free(folder / "lock"):
                shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _is_free(path: Path) -> bool:
    """Whether nobody holds the lock; also if there is none, as in a folder whose making was cut short."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
