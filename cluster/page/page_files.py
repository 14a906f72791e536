"""The page's files over HTTP: read once, told apart by their content, and locked into their own site."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..front.errors import RequestError

INDEX = "index.html"
_FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline: a text that slips in as HTML could neither run nor load or send anything.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Kept by browsers, but asked for each time, which costs a 304: files of two versions of flyray must not mix.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    kind: str
    tag: str


class PageFiles:
    """All of them by name. A name is looked up, never a path: nothing else can be read."""

    def __init__(self) -> None:
        self._files = {path.name: _read(path) for path in _FOLDER.iterdir() if path.suffix in _TYPES}

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def answer(self, request: Request, name: str = INDEX) -> Response:
        """GET / and /page/NAME. 304 for a browser that has it, 404 for a name that there is not."""
        file = self._files.get(name)
        if file is None:
            error = RequestError(f"the page has no file {name[:100]!r}", status=404, code="not_found")
            return JSONResponse(error.body(), 404)
        headers = _HEADERS | {"ETag": file.tag}
        if file.tag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.kind)


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
