"""Copying files as `cp` does, timed: the floor of whatever reads a checkpoint and writes one of about its size."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path


def seconds_to_copy(source: Path, target: Path) -> float:
    """Seconds that `cp -r` takes with what it wrote on disk (`sync`); the copy is deleted afterwards."""
    begin = time.monotonic()
    try:
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
        sync(target)
        return time.monotonic() - begin
    finally:
        shutil.rmtree(target, ignore_errors=True)


def sync(folder: Path) -> None:
    """Waits until the files of a folder are on disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def forget(folder: Path) -> None:
    """Asks the kernel to drop a folder's files from the page cache, so that they are read from the disk again."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
