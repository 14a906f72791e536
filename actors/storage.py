"""Where a checkpoint's files lie: in a folder here, read with positioned reads, or behind an fsspec URL (s3://, gs://,
hf://, memory://...), read by byte ranges."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upath import UPath

    StoredPath = Path | UPath
    """A folder or file, with the interface of pathlib."""

_RANGE = 64 << 20  # a range of a remote file is in memory twice while it is copied


class StorageError(Exception):
    """A file that cannot be read; the message says why, not which."""


def stored_path(path: str | os.PathLike[str] | UPath) -> StoredPath:
    """A string with "://" is an fsspec URL, everything else a path here; file:// URLs are paths here too.

    Raises StorageError for a URL of an unknown kind, or whose file system is not installed.
    """
    if isinstance(path, str) and "://" in path:
        # Imported only for a URL: fsspec takes a while.
        from upath import UPath

        try:
            path = UPath(path)
            path.fs  # noqa: B018 - made here, to fail here
        except (ImportError, ValueError) as error:
            raise StorageError(f"no file system for this URL: {error}") from error
    return Path(path) if isinstance(path, str | os.PathLike) else path


def read_range(file: StoredPath, begin: int, target: memoryview) -> int:
    """Fills `target` with the file's bytes from `begin` on; returns how many there were before it ended."""
    if isinstance(file, Path):
        return _read_here(file, begin, target)
    done = 0
    try:
        while done < len(target):
            end = min(begin + len(target), begin + done + _RANGE)
            data: Any = file.fs.cat_file(file.path, start=begin + done, end=end)
            target[done : done + len(data)] = data
            done += len(data)
            if begin + done < end:
                break
    except Exception as error:  # each file system has its own
        raise StorageError(reason(error)) from error
    return done


def reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def _read_here(file: Path, begin: int, target: memoryview) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise StorageError(reason(error)) from error
    try:
        done = 0
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], begin + done)
            if count == 0:
                break
            done += count
        return done
    except OSError as error:
        raise StorageError(reason(error)) from error
    finally:
        os.close(descriptor)
