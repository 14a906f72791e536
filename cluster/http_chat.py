"""A client of a flyray server (or another OpenAI-compatible one) for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 600.0


class ChatClientError(Exception):
    """The server cannot be reached, or refused; the message says what it said."""


@dataclass(frozen=True)
class ChatNews:
    """A part of an answer. finish: "" while it runs."""

    reasoning: str = ""
    content: str = ""
    tool_call: str = ""
    finish: str = ""
    completion_tokens: int = 0


class HttpChat:
    """Streams answers from the server at `url`, with or without "/v1" at its end. api_key: "" for none."""

    def __init__(self, url: str, api_key: str = "") -> None:
        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise ChatClientError(f"{url!r} is no URL; it begins with http:// or https://")
        timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        self._client = httpx.Client(base_url=base, timeout=timeout, headers=bearer(api_key))

    def __enter__(self) -> HttpChat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def model(self) -> str:
        """The first model that the server has."""
        try:
            response = self._client.get("/v1/models")
            if response.status_code == httpx.codes.UNAUTHORIZED:
                raise ChatClientError(_error_text(response.content, response.status_code))
            response.raise_for_status()
            return response.json()["data"][0]["id"]
        except httpx.HTTPError as error:
            raise ChatClientError(f"{self._client.base_url}: {error}") from error
        except (ValueError, KeyError, IndexError) as error:
            raise ChatClientError(f"{self._client.base_url}/v1/models did not answer with a list of models") from error

    def answer(self, request: dict[str, Any]) -> Iterator[ChatNews]:
        """Streams the answer to a chat request's body."""
        body = request | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ChatClientError(_error_text(response.read(), response.status_code))
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _news(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            raise ChatClientError(f"{self._client.base_url}: {error}") from error


def bearer(api_key: str) -> dict[str, str]:
    """The header that lets a client in; none without a key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _news(chunk: dict[str, Any]) -> ChatNews:
    if "error" in chunk:
        raise ChatClientError(chunk["error"]["message"])
    usage: dict[str, Any] = chunk.get("usage") or {}
    choice: dict[str, Any] = chunk["choices"][0] if chunk["choices"] else {"delta": {}}
    delta: dict[str, Any] = choice["delta"]
    functions = [call["function"] for call in delta.get("tool_calls") or ()]
    return ChatNews(
        reasoning=delta.get("reasoning_content") or "",
        content=delta.get("content") or "",
        tool_call="".join(f"\n{each.get('name') or ''}" + each.get("arguments", "") for each in functions),
        finish=choice.get("finish_reason") or "",
        completion_tokens=usage.get("completion_tokens", 0),
    )


def _error_text(body: bytes, status: int) -> str:
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {body[:200].decode(errors='replace')}"
