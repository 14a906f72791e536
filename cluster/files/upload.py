"""POST /v1/files: a form whose file goes to the disk as it comes, whatever its size."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..front.errors import RequestError
from ..names import nearest
from .file_store import BATCH_INPUT, NewFile

_FIELDS = ("file", "purpose")
_LONGEST_PURPOSE = 64
_LONGEST_NAME = 255
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class _Part:
    """A part of the form: its name, and for a file its name at the client's."""

    name: str
    filename: str | None


class Upload:
    """Takes one form to its end, and says then what was wrong with it: before it many a client does not listen."""

    def __init__(self, content_type: str, new: NewFile, limit: int) -> None:
        """content_type: the request's header. limit: bytes that a file may have. Raises RequestError."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise _refusal(f"the body must be multipart/form-data with 'file' and 'purpose', not {content_type[:80]!r}")
        self.filename = ""
        self.purpose = ""
        self._new, self._limit = new, limit
        self._error: RequestError | None = None
        self._part: _Part | None = None
        self._seen: set[str] = set()
        self._header, self._value = b"", b""
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            },
        )

    async def read(self, chunks: AsyncIterator[bytes]) -> None:
        """Reads all of the body, and writes the file. Raises RequestError."""
        async for chunk in chunks:
            if self._error is None:
                self._take(chunk)
        if self._error is None:
            self._check_whole()
        if self._error is not None:
            raise self._error

    def _take(self, chunk: bytes) -> None:
        """Writes it here and not in a thread: Serve takes in all that comes while it waits for one, so that a disk that
        is slower than the network would have the file in memory. What is written goes to the system's cache."""
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            self._error = _refusal(f"the body is no multipart/form-data: {error}")
        except OSError as error:
            self._error = disk_error(error)

    def _check_whole(self) -> None:
        if not self._ended:
            self._error = _refusal("the body ends before its last boundary")
        elif missing := [name for name in _FIELDS if name not in self._seen]:
            self._error = _refusal(f"'{missing[0]}' is missing", missing[0])
        elif self.purpose != BATCH_INPUT:
            message = f"'purpose': {self.purpose!r} is not supported; files are kept for {BATCH_INPUT!r} alone"
            self._error = _refusal(message, "purpose")
        elif not self._new.size:
            self._error = _refusal("'file' is empty", "file")

    def _on_part_begin(self) -> None:
        self._part = None
        self._header = self._value = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            name = options.get(b"name", b"").decode(errors="replace")
            filename = options.get(b"filename")
            self._part = _Part(name, None if filename is None else filename.decode(errors="replace"))
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        part = self._part
        if part is None:
            return self._fail("a part of the form has no Content-Disposition")
        if part.name not in _FIELDS:
            hint = "; files are kept until they are deleted" if part.name.startswith("expires_after") else ""
            return self._fail(f"unknown field '{part.name}'{nearest(part.name, _FIELDS)}{hint}", part.name)
        if part.name in self._seen:
            return self._fail(f"'{part.name}' is given twice", part.name)
        if part.name == "file" and not 0 < len(part.filename or "") <= _LONGEST_NAME:
            return self._fail(f"'file' must be a file with a name of 1 to {_LONGEST_NAME} characters", "file")
        self._seen.add(part.name)
        self.filename = part.filename or self.filename
        return None

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._error is not None or self._part is None:
            return
        if self._part.name == "purpose":
            self.purpose += data[start:end].decode(errors="replace")
            if len(self.purpose) > _LONGEST_PURPOSE:
                self._fail(f"'purpose' must be {BATCH_INPUT!r}, not {self.purpose[:20]!r}…", "purpose")
            return
        if self._new.size + end - start > self._limit:
            message = f"'file' has more than {self._limit} bytes, the most that serve.max_file_size takes"
            self._error = RequestError(message, status=413, param="file", code="file_too_large")
        else:
            self._new.write(memoryview(data)[start:end])

    def _on_end(self) -> None:
        self._ended = True

    def _fail(self, message: str, param: str | None = None) -> None:
        self._error = self._error or _refusal(message, param)


def _refusal(message: str, param: str | None = None) -> RequestError:
    return RequestError(message, param=param, code="invalid_request")


def disk_error(error: OSError) -> RequestError:
    """507 where there is no room for a file, else 500; nothing half written stays."""
    if error.errno in NO_ROOM:
        return RequestError(f"serve.files has no room: {error.strerror}", status=507, code="no_room")
    return RequestError(f"serve.files cannot be used: {error.strerror}", status=500, code="storage_error")
