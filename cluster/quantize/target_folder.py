"""Where output files go: a local folder, or one on another file system of fsspec's, with the same few operations.

What is written under a final name is whole and, in a local folder, on disk: files are made under a hidden name
".NAME.*.part" in the same folder, flushed, and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from upath import UPath

from .location import Location
from .matrix import QuantizeError


class TargetFolder(Protocol):
    """A folder of output files, which need not exist yet. Methods raise OSError as the file system does."""

    place: Location

    def create(self) -> None: ...

    def names(self) -> list[str]:
        """Of everything in it but hidden parts of unfinished files; empty if it does not exist."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none."""
        ...

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes) -> None:
        """The whole file, or after an error or a crash what was there before."""
        ...

    def remove(self, name: str) -> None:
        """No error if it is not there."""
        ...

    def remove_parts(self) -> None:
        """Removes what killed runs left of unfinished files."""
        ...

    def remove_if_empty(self) -> None: ...

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        """A local folder in which a file is made before `publish` puts it in its place."""
        ...

    def publish(self, file: Path) -> None:
        """Moves a finished, flushed file of `staging` in, under its own name."""
        ...

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Held by one process at a time, and gone with it; QuantizeError if another holds it."""
        ...


def target_folder(place: Location) -> TargetFolder:
    return LocalFolder(place) if isinstance(place, Path) else RemoteFolder(place)


def part_path(path: Path) -> Path:
    """A new name to write `path` under before it is whole: hidden, and nobody else's, not even that of a process that
    was taken for dead."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def is_part(name: str) -> bool:
    return name.startswith(".") and name.endswith(".part")


def sync_folder(folder: Path) -> None:
    """Puts renames in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalFolder:
    """A folder that every node sees under the same path."""

    def __init__(self, place: Path) -> None:
        self.place: Location = place
        self._path = place

    def create(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        if not self._path.is_dir():
            return []
        return sorted(path.name for path in self._path.iterdir() if not is_part(path.name))

    def size(self, name: str) -> int | None:
        file = self._path / name
        return file.stat().st_size if file.is_file() else None

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        part = part_path(self._path / name)
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._path / name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(self._path)

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def remove_parts(self) -> None:
        for path in self._path.glob(".*.part"):
            path.unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        if not any(self._path.iterdir()):
            self._path.rmdir()

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        yield self._path

    def publish(self, file: Path) -> None:
        """The writer has renamed it within the folder already."""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise QuantizeError(f"{self._path}: another flyray quantize is writing there") from None
            yield
        finally:
            os.close(descriptor)


class RemoteFolder:
    """A folder on a file system of fsspec's. Stores of objects replace a file in one step; on others a file may be
    seen half uploaded, but then quantize.json does not record it."""

    def __init__(self, place: UPath) -> None:
        self.place: Location = place
        self._path = place

    def create(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return sorted(path.name for path in self._path.iterdir()) if self._path.is_dir() else []

    def size(self, name: str) -> int | None:
        file = self._path / name
        return file.stat().st_size if file.is_file() else None

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self._path / name).write_bytes(data)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._path / name).unlink()

    def remove_parts(self) -> None:
        """Unfinished files lie in temporary folders of the nodes."""

    def remove_if_empty(self) -> None:
        if not self.names():
            self._path.rmdir()

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="flyray-upload-") as folder:
            yield Path(folder)

    def publish(self, file: Path) -> None:
        target = self._path / file.name
        target.fs.put_file(str(file), target.path)
        size, sent = self.size(file.name), file.stat().st_size
        if size != sent:
            raise QuantizeError(f"{target}: holds {size} bytes after an upload of {sent}")
        file.unlink()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Object stores have no locks; two runs of the same recipe write the same bytes."""
        yield
