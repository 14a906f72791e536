"""Runs batch lines on a server that is already running, over HTTP."""

from __future__ import annotations

import asyncio
import uuid
from types import TracebackType
from typing import Any

import httpx

from ..http_chat import bearer
from .job import ServiceLost
from .line import Answer, BatchLine

BUSY = (429, 503)
PRIORITY = {"X-Flyray-Priority": "1"}  # behind interactive requests; other servers do not know it
PATIENCE_S = 120.0  # how long a server may be away or too busy before the job stops
ANSWER_TIMEOUT_S = 1800.0  # a long answer at low priority on a busy server


class HttpRunner:
    """A `LineRunner` over an OpenAI-compatible server at `url`, with or without "/v1" at its end.

    One that refuses the key (`api_key`, "" for none) ends the job with ServiceLost. One that says it is busy, or that
    cannot be reached, is tried again for `patience_s`; then ServiceLost, unless its health is good and it is only this
    request that it refuses. Raises ValueError for what is no HTTP address.
    """

    def __init__(self, url: str, *, api_key: str = "", patience_s: float = PATIENCE_S) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address of a server; it begins with http:// or https://")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._patience_s = patience_s
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=10.0)
        # The job bounds how many requests run; the connections need no second bound.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        headers = PRIORITY | bearer(api_key)
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, headers=headers, trust_env=False)

    async def __aenter__(self) -> HttpRunner:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def run(self, line: BatchLine) -> Answer:
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._patience_s
        wait = 0.5
        while True:
            trouble, answer, asked_wait = await self._try(line)
            if answer and not trouble:
                return answer
            if clock() + max(wait, asked_wait) > deadline:
                if answer and await self._is_healthy():
                    return answer
                raise ServiceLost(f"{self._url} {trouble}, for {self._patience_s:.0f} s")
            await asyncio.sleep(max(wait, asked_wait))
            wait = min(2 * wait, 10.0)

    async def _is_healthy(self) -> bool:
        try:
            return (await self._client.get(self._url + "/health", timeout=10.0)).is_success
        except httpx.HTTPError:
            return False

    async def _try(self, line: BatchLine) -> tuple[str, Answer | None, float]:
        """What is wrong with the server ("" if nothing), its answer, and the seconds it asks to wait."""
        try:
            response = await self._client.post(self._url + line.url, json=line.body)
        except httpx.ConnectError as error:
            return f"cannot be reached ({error or 'no connection'})", None, 0.0
        except httpx.HTTPError as error:
            return f"broke off in the middle of a request ({error or type(error).__name__})", None, 0.0
        body = _body(response)
        answer = Answer(response.status_code, response.headers.get("x-request-id") or f"req_{uuid.uuid4().hex}", body)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise ServiceLost(f"{self._url} lets nobody in so: {_message(body)}")
        if response.status_code not in BUSY:
            return "", answer, 0.0
        asked = response.headers.get("retry-after", "")
        return f"refuses requests ({_message(body)})", answer, float(asked) if asked.isdigit() else 0.0


def _body(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict):
        return body
    message = f"the server answered with status {response.status_code} and no JSON object: {response.text[:200]!r}"
    return {"error": {"message": message, "type": "server_error", "param": None, "code": "not_json"}}


def _message(body: dict[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("message", error)) if isinstance(error, dict) else str(body)[:200]
