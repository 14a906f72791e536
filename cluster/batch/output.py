"""The output of a batch job: one result a line, only ever appended to, so that a job can die anywhere and go on.

What a crash can leave is a last line without its newline: it is cut, and its request runs again. Two jobs cannot write
one file: it is locked while open, and the lock goes with the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from .line import RESULT_BEGIN, ResultHead, parse_result, read_lines


class BatchFileError(Exception):
    """The input or the output cannot be used as it is; the message says which, and why."""


def fingerprint(custom_id: str) -> int:
    """128 bits of a custom_id: what a job remembers of each line, however long the ids are."""
    digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest, "big")


class BatchOutput:
    """An output file open for appending, with the memory of what stands in it.

    Raises BatchFileError when the file is another job's, or has whole lines that are no results of a batch job; such a
    file is left as it is.
    """

    def __init__(self, path: Path, *, drop_errors: bool = False) -> None:
        self.path = path
        self.succeeded = 0
        self.failed = 0
        self.cut_bytes = 0
        self.dropped_errors = 0
        self._done: set[int] = set()
        self._reported_lines: set[int] = set()
        self._descriptor = _open_locked(path)
        try:
            self._read_back()
            if drop_errors and self.failed:
                self._rewrite_without_errors()
        except BaseException:
            os.close(self._descriptor)
            raise

    def is_done(self, mark: int) -> bool:
        """Whether an earlier run wrote the result of the request whose custom_id has this fingerprint."""
        return mark in self._done

    def is_reported(self, line: int) -> bool:
        """Whether an earlier run wrote an error for this line of the input, one without a custom_id."""
        return line in self._reported_lines

    @property
    def results(self) -> int:
        """How many results with a custom_id earlier runs left."""
        return len(self._done)

    def append(self, results: Iterable[bytes]) -> None:
        """Writes whole lines, in the operating system's hands when this returns; or none, and raises OSError."""
        end = os.fstat(self._descriptor).st_size
        try:
            _write_all(self._descriptor, b"".join(results))
        except OSError:
            os.ftruncate(self._descriptor, end)  # or the next line would go on where this one broke off
            raise

    def close(self) -> None:
        """Puts everything on the disk and lets the file go."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read_back(self) -> None:
        position = 0
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for line in read_lines(file):
                position = file.tell()
                if position == size and not self._ends_with_newline():
                    self._check_torn(line.number, line.data)
                    os.ftruncate(self._descriptor, position - line.length)
                    self.cut_bytes = line.length
                    return
                self._remember(line.number, self._parse(line.number, line.data))

    def _check_torn(self, number: int, data: bytes) -> None:
        """A file that begins with such a line may be anybody's; cutting it would lose it."""
        known = self._done or self._reported_lines
        if not known and data[: len(RESULT_BEGIN)] != RESULT_BEGIN[: len(data)]:
            raise BatchFileError(
                f"{self.path} line {number} is not a batch result; name a new file, or the output of this job"
            )

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _parse(self, number: int, data: bytes) -> ResultHead:
        try:
            return parse_result(data)
        except ValueError as error:
            raise BatchFileError(
                f"{self.path} line {number} is not a batch result ({error}); name a new file, or the output of this job"
            ) from None

    def _remember(self, number: int, head: ResultHead) -> None:
        if head.custom_id is None:
            self._reported_lines.add(head.line)
        elif (mark := fingerprint(head.custom_id)) in self._done:
            raise BatchFileError(f"{self.path} line {number}: a second result of custom_id {head.custom_id!r}")
        else:
            self._done.add(mark)
        self.succeeded += head.ok
        self.failed += not head.ok

    def _rewrite_without_errors(self) -> None:
        """Puts a file with only the successes in the place of this one, in one step."""
        temporary = self.path.with_name(f".{self.path.name}.retry")
        temporary.unlink(missing_ok=True)
        descriptor = _open_locked(temporary)
        self._done.clear()
        self._reported_lines.clear()
        with self.path.open("rb") as old:
            for line in read_lines(old):
                head = parse_result(line.data)
                if head.ok and head.custom_id is not None:
                    self._done.add(fingerprint(head.custom_id))
                    _write_all(descriptor, line.data + b"\n")
        os.fsync(descriptor)
        temporary.replace(self.path)
        os.close(self._descriptor)
        self._descriptor = descriptor
        self.dropped_errors, self.failed = self.failed, 0


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _open_locked(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BatchFileError(f"{path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another job may have put a new file here between opening and locking.
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise BatchFileError(f"{path} is being written by another batch job") from None
        os.close(descriptor)
