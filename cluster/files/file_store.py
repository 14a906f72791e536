"""The files of clients and of batches, in a folder that all fronts and the runner see."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..scratch_folder import scratch_folder
from .durable import publish, read_json, sync_folder, write_json
from .identity import FILE, Page, created_at, is_id, new_id

BATCH_INPUT = "batch"
BATCH_OUTPUT = "batch_output"
_CONTENT, _OBJECT, _USED = "content", "object.json", "used-"


@dataclass(frozen=True)
class StoredFile:
    """A file as it is kept. size: bytes. purpose: `BATCH_INPUT` or `BATCH_OUTPUT`. filename: as the client named it;
    no path is ever made of it."""

    id: str
    filename: str
    purpose: str
    size: int

    def body(self) -> dict[str, Any]:
        """OpenAI's "file" object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": created_at(self.id, FILE),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
            "expires_at": None,
        }


class NewFile:
    """A file that is being written; it is there for others once it is `keep`t."""

    def __init__(self, folder: Path, files: Path, name: str) -> None:
        self.id = name
        self._folder, self._target = folder, files / name
        self._busy = threading.Lock()
        folder.mkdir()
        self._file = (folder / _CONTENT).open("wb", buffering=0)
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Raises OSError when there is no room."""
        rest = memoryview(data)
        with self._busy:
            while rest:
                rest = rest[self._file.write(rest) :]
            self.size += len(data)

    def keep(self, filename: str, purpose: str) -> StoredFile:
        """Puts it on the disk and in its place."""
        with self._busy:
            os.fsync(self._file.fileno())
            stored = StoredFile(self.id, filename, purpose, self.size)
            write_json(self._folder / _OBJECT, asdict(stored))
            publish(self._folder, self._target)
        return stored

    def close(self) -> None:
        """Waits for a thread that writes or keeps it, whose caller may have left."""
        with self._busy:
            self._file.close()


class FileStore:
    """Files by id. All methods touch the disk and raise OSError; LookupError says that there is no such file."""

    def __init__(self, root: Path) -> None:
        """Makes the folder if need be."""
        self._files, self._new = root / "files", root / "new"
        for folder in (root, self._files, self._new):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def create(self, name: str = "") -> Iterator[NewFile]:
        """A file to write, with a new id unless `name` is one; removed with the context unless it was kept."""
        with scratch_folder(self._new, "write-") as scratch:
            new = NewFile(scratch / FILE, self._files, name or new_id(FILE))
            try:
                yield new
            finally:
                new.close()

    def get(self, name: str) -> StoredFile:
        """Raises LookupError."""
        content = read_json(self._files / name / _OBJECT) if is_id(name, FILE) else None
        if content is None:
            raise LookupError(name)
        return StoredFile(**content)

    def content(self, name: str) -> Path:
        """Where its bytes are. Raises LookupError."""
        self.get(name)
        return self._files / name / _CONTENT

    def list(self, page: Page, purpose: str = "") -> tuple[list[StoredFile], bool]:
        """A page of the files of a purpose, or of all; and whether there are more."""
        found: list[StoredFile] = []
        for name in page.candidates(entry.name for entry in self._files.iterdir() if is_id(entry.name, FILE)):
            try:
                file = self.get(name)
            except LookupError:  # deleted meanwhile
                continue
            if purpose and file.purpose != purpose:
                continue
            if len(found) == page.limit:
                return found, True
            found.append(file)
        return found, False

    def mark_used(self, name: str, batch: str) -> None:
        """Notes that a batch reads the file. Raises LookupError."""
        self.get(name)
        (self._files / name / (_USED + batch)).touch()
        sync_folder(self._files / name)

    def delete(self, name: str, is_running: Callable[[str], bool]) -> str:
        """Removes a file, unless a batch for which `is_running` reads it: then its id is returned, else "".

        Hold the store's lock meanwhile. Raises LookupError.
        """
        self.get(name)
        folder = self._files / name
        for mark in folder.glob(f"{_USED}*"):
            if is_running(batch := mark.name.removeprefix(_USED)):
                return batch
        with scratch_folder(self._new, "remove-") as scratch:
            folder.rename(scratch / FILE)
            sync_folder(self._files)
        return ""
