"""Folders for the while, which a killed process leaves to the next one to remove."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = "lock"


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder `prefix`… in parent, which is made if need be; removed with the context.

    It is held by a file lock that dies with its process. First removes folders of that prefix that nobody holds.
    """
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_abandoned(parent, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    lock = _claim(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes folders whose process has died: nobody holds their lock."""
    for lock in parent.glob(f"{prefix}*/{_LOCK}"):
        with suppress(FileNotFoundError, BlockingIOError), lock.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def _claim(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed or the process dies. The file gets its name when it
    is locked, so nobody ever sees it free."""
    new = folder / f"{_LOCK}.new"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    new.rename(folder / _LOCK)
    return descriptor
