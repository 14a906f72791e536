"""What stands before all routes of a front: keys, and which other sites' pages may ask."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .api_keys import ApiKeys
from .errors import RequestError

_OPEN = ("/", "/health", "/metrics")
_OPEN_BELOW = "/page/"
_SCHEME = "bearer "


def guard(app: FastAPI, keys: ApiKeys | None, cors_origins: Sequence[str]) -> None:
    """Puts the gate and the CORS rules before an app that serves nothing yet. keys: None lets everybody in."""
    if keys is not None:
        app.add_middleware(Gate, keys=keys)
    if cors_origins:
        # Outermost, so that a browser's preflight needs no key and a page can read why it was refused.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )


class Gate:
    """ASGI middleware: without a key only the page's files, /health and /metrics are answered."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]):
            refusal = self._refusal(Headers(scope=scope).get("authorization", ""))
            if refusal is not None:
                await _read(receive)
                headers = {"WWW-Authenticate": "Bearer"}
                await JSONResponse(refusal.body(), refusal.status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, authorization: str) -> RequestError | None:
        if not authorization:
            message = "this server needs an API key: send it in the header 'Authorization: Bearer KEY'"
        elif authorization[: len(_SCHEME)].lower() != _SCHEME:
            message = "the header 'Authorization' must be 'Bearer KEY'"
        elif authorization[len(_SCHEME) :].strip() not in self._keys:
            message = "the API key is not one of this server's"
        else:
            return None
        return RequestError(message, status=401, code="invalid_api_key")


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_BELOW)


async def _read(receive: Receive) -> None:
    """Takes a request's body and forgets it: before its end many a client does not listen."""
    while (await receive()).get("more_body"):
        pass
