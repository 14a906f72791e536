"""Lines of a batch job in OpenAI's form: requests read from the input, results written to the output.

A request is ``{"custom_id", "method": "POST", "url", "body": {…}}`` with one of `URLS`; a result is
``{"id", "custom_id", "response": {"status_code", "request_id", "body"} | null, "error": {…} | null}``. As in OpenAI's
files, ``error`` is for lines that never became a request; a request that was answered with an error has that answer in
``response``, and there ``status_code`` is not 200.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

URLS = ("/v1/chat/completions", "/v1/completions")
FIELDS = ("custom_id", "method", "url", "body")
RESULT_BEGIN = b'{"id":"batch_req_'
"""How every line of an output begins."""
# Far above any prompt that fits a context; a "line" that is longer is some other file.
LONGEST_LINE = 32 * 1024 * 1024


@dataclass(frozen=True)
class RawLine:
    """A line of the input as it stands: its number from 1, its bytes without the newline (cut when too long), its
    length in the file with the newline."""

    number: int
    data: bytes
    length: int


@dataclass(frozen=True)
class BatchLine:
    """A valid request of the input."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What became of one request: an HTTP status, the id under which it ran, and the response's body."""

    status: int
    request_id: str
    body: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.status == 200


class LineError(ValueError):
    """A line that cannot be run. The message names the line's number and the field; ``field`` is "" for the whole.

    code: a stable short name, OpenAI's where it has one.
    """

    def __init__(self, number: int, field: str, reason: str, code: str = "") -> None:
        super().__init__(f"line {number}: {field}: {reason}" if field else f"line {number}: {reason}")
        self.number = number
        self.field = field
        self.code = code or ("invalid_line" if field else "invalid_json_line")


def read_lines(file: BinaryIO) -> Iterator[RawLine]:
    """Yields the lines of a file that may be larger than memory; empty lines are counted and left out."""
    number = 0
    while chunk := file.readline(LONGEST_LINE + 1):
        number += 1
        length = len(chunk)
        rest = chunk
        while not rest.endswith(b"\n") and (rest := file.readline(LONGEST_LINE)):
            length += len(rest)
        data = chunk.removeprefix(b"\xef\xbb\xbf") if number == 1 else chunk
        if data := data.strip():
            yield RawLine(number, data, length)


def parse_line(line: RawLine) -> BatchLine:
    """Checks one line of the input; what the body must hold is the endpoint's business.

    Raises LineError naming the line and the field.
    """
    number = line.number
    if line.length > LONGEST_LINE + 1:
        raise LineError(number, "", f"is {line.length} bytes long; at most {LONGEST_LINE} are read")
    content = _parse_object(line)
    for name in content:
        if name not in FIELDS:
            raise LineError(number, str(name), f"unknown field; a line has {', '.join(FIELDS)}")
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError(number, "custom_id", f"must be a non-empty string, not {_short(custom_id)}")
    method = content.get("method")
    if method != "POST":
        raise LineError(number, "method", f'must be "POST", not {_short(method)}')
    url = content.get("url")
    if url not in URLS:
        raise LineError(number, "url", f"must be {' or '.join(URLS)}, not {_short(url)}")
    body = content.get("body")
    if not isinstance(body, dict):
        raise LineError(number, "body", f"must be an object, not {_short(body)}")
    if body.get("stream"):
        raise LineError(number, "body.stream", "a batch line cannot be streamed; leave it out")
    return BatchLine(number, custom_id, url, body)


def _parse_object(line: RawLine) -> dict[str, Any]:
    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        content = json.loads(line.data.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise LineError(line.number, "", f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise LineError(line.number, "", "not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise LineError(line.number, "", f"not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise LineError(line.number, "", f"must be a JSON object, not {_short(content)}")
    return content


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class ResultHead:
    """What a resumed run must know of a result: whose it is, and whether it is a success.

    ``custom_id`` is None for a line that never had a usable one; then ``line`` is its number.
    """

    custom_id: str | None
    line: int
    ok: bool


def result_line(line: BatchLine, answer: Answer) -> bytes:
    """The output line of a request that was answered; an error's message gets the line's number."""
    body = answer.body
    if not answer.ok:
        body = _with_line_number(line.number, body)
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": body}
    return _encode({"id": _result_id(), "custom_id": line.custom_id, "response": response, "error": None})


def error_line(error: LineError) -> bytes:
    """The output line of an input line that cannot be run.

    It has no custom_id even if one could be read: a duplicate's belongs to another line's result.
    """
    content = {"code": error.code, "message": str(error), "param": error.field or None, "line": error.number}
    return _encode({"id": _result_id(), "custom_id": None, "response": None, "error": content})


def error_result(custom_id: str, code: str, message: str) -> bytes:
    """The output line of a request that was never run."""
    error = {"code": code, "message": message}
    return _encode({"id": _result_id(), "custom_id": custom_id, "response": None, "error": error})


def parse_result(data: bytes) -> ResultHead:
    """Reads a line of the output. Raises ValueError when it is not one."""
    content = json.loads(data)
    if not isinstance(content, dict) or not {"id", "custom_id", "response", "error"} <= set(content):
        raise ValueError("it has not the fields id, custom_id, response and error")
    custom_id, response, error = content["custom_id"], content["response"], content["error"]
    if isinstance(custom_id, str):
        return ResultHead(
            custom_id, 0, error is None and isinstance(response, dict) and response.get("status_code") == 200
        )
    if isinstance(error, dict) and isinstance(error.get("line"), int):
        return ResultHead(None, error["line"], ok=False)
    raise ValueError("it has neither a custom_id nor an error with a line number")


def _with_line_number(number: int, body: dict[str, Any]) -> dict[str, Any]:
    error = body.get("error")
    if not isinstance(error, dict) or "message" not in error:
        return body
    return {**body, "error": {**error, "message": f"line {number}: {error['message']}"}}


def _result_id() -> str:
    return f"batch_req_{uuid.uuid4().hex[:24]}"


def _encode(content: dict[str, Any]) -> bytes:
    try:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON allows as an escape only
        return json.dumps(content, separators=(",", ":")).encode() + b"\n"
