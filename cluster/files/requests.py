"""What a client may ask of files and batches, strictly."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from starlette.datastructures import QueryParams

from ..front.errors import RequestError
from ..front.sampling_request import Strict, fail
from ..names import nearest
from .identity import Page, is_id

FILES_LIMIT = 10_000
"""Most files of one list, and how many there are unless it says otherwise, as OpenAI's."""
BATCHES_LIMIT = 100
_BATCHES_DEFAULT = 20
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_WINDOW = re.compile(r"([1-9]\d{0,4})([smhd])")

Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


def _window(value: Any) -> Any:
    if not isinstance(value, str) or _WINDOW.fullmatch(value) is None:
        raise fail("must be a number of hours or of another unit of s, m, h, d, such as '24h'")
    return value


class BatchRequest(Strict):
    """POST /v1/batches. completion_window: OpenAI's "24h", or another time; what is not answered by then expires."""

    input_file_id: str = Field(min_length=1)
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Annotated[str, BeforeValidator(_window)]
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    # What a batch writes is kept until it is deleted.
    output_expires_after: None = None

    @property
    def window_s(self) -> int:
        """The window in seconds."""
        count, unit = self.completion_window[:-1], self.completion_window[-1]
        return int(count) * _SECONDS[unit]


def files_page(query: QueryParams, prefix: str) -> tuple[Page, str]:
    """GET /v1/files: the page, and the purpose or "" for all. Raises RequestError."""
    _check_names(query, ("after", "limit", "order", "purpose"))
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise _refusal("order", f"must be 'asc' or 'desc', not {order[:20]!r}")
    limit = _limit(query, FILES_LIMIT, FILES_LIMIT)
    return Page(limit, _after(query, prefix), newest_first=order == "desc"), query.get("purpose", "")


def batches_page(query: QueryParams, prefix: str) -> Page:
    """GET /v1/batches. Raises RequestError."""
    _check_names(query, ("after", "limit"))
    return Page(_limit(query, BATCHES_LIMIT, _BATCHES_DEFAULT), _after(query, prefix))


def _check_names(query: QueryParams, known: Iterable[str]) -> None:
    for name in query:
        if name not in known:
            raise RequestError(f"unknown parameter '{name}'{nearest(name, known)}", param=name, code="invalid_request")


def _limit(query: QueryParams, most: int, default: int) -> int:
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= most):
        raise _refusal("limit", f"must be 1 to {most}, not {text[:20]!r}")
    return int(text)


def _after(query: QueryParams, prefix: str) -> str:
    after = query.get("after", "")
    if after and not is_id(after, prefix):
        raise _refusal("after", f"must be an id such as a list has, not {after[:60]!r}")
    return after


def _refusal(name: str, message: str) -> RequestError:
    return RequestError(f"'{name}': {message}", param=name, code="invalid_request")
