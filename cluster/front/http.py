"""OpenAI's endpoints over a `ChatService`: JSON in, JSON or server-sent events out. No Ray in here."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..chat import ChatService
from .answers import AnswerHead, ChatDelta, TextDelta, Usage, chat_chunk, delta_body, text_choice, usage_chunk
from .engine_view import EngineView
from .errors import EngineUnavailable, RequestError
from .event_stream import DONE, EventStream, disconnected, event
from .metrics import CONTENT_TYPE, FrontMetrics
from .requests import ChatRequest, CompletionRequest, parse
from .tokenizing import DetokenizeRequest, TokenizeRequest

T = TypeVar("T")

# Far above any prompt that fits a context, as text and as ids; parsing and encoding it holds up all other requests.
LARGEST_BODY = 16 << 20
# nginx's status for a client that closed the connection; nobody reads it but logs.
CLIENT_CLOSED = 499
# Half of a character beyond U+FFFF. One alone is no character, and would reach the model as another.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class EngineAccess(Protocol):
    """The way to the engines."""

    async def service(self) -> ChatService:
        """Raises EngineUnavailable with the reason where there is no engine to wait for."""
        ...

    async def views(self) -> list[EngineView]: ...

    def idle(self) -> bool: ...

    def absence(self) -> EngineUnavailable: ...


class HttpFront:
    """The handlers. model_name: the served model, known also while the engine starts; created: a Unix time."""

    def __init__(self, engine: EngineAccess, model_name: str, created: int, metrics: FrontMetrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._model = {"id": model_name, "object": "model", "created": created, "owned_by": "flyray"}

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await _answering(request, self._chat)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await _answering(request, self._completions)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize"""
        return await _answering(request, self._tokenize)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize"""
        return await _answering(request, self._detokenize)

    async def version(self) -> Response:
        """GET /version"""
        return JSONResponse({"version": version("flyray")})

    async def models(self) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, name: str) -> Response:
        """GET /v1/models/NAME"""
        if name == self._model["id"]:
            return JSONResponse(self._model)
        message = f"there is no model {name!r}; this server has {self._model['id']!r}"
        return error_response(RequestError(message, status=404, param="model", code="model_not_found"))

    async def health(self) -> Response:
        """GET /health: 200 when an engine takes requests, or the next request has one started; else 503."""
        views = await self._engine.views()
        ready = [view for view in views if view.stage == "ready"]
        recovering = any(view.stage == "recovering" for view in views)
        idle = self._engine.idle()
        error = "" if ready or idle else self._engine.absence().message
        body = {
            "status": "ready" if ready else "idle" if idle else "recovering" if recovering else "unavailable",
            "error": error,
            "engines": [_health_of(view) for view in views],
            "precision_plan": list(ready[0].status.precision_plan) if ready and ready[0].status else [],
        }
        return JSONResponse(body, status_code=503 if error else 200)

    async def metrics(self, others: Sequence[FrontMetrics] = ()) -> Response:
        """GET /metrics, for Prometheus; also while there is no engine. others: of processes that no client asks."""
        return Response(self._metrics.text(await self._engine.views(), others), media_type=CONTENT_TYPE)

    async def _chat(self, request: Request, body: bytes) -> Response:
        chat = parse(_json(body), ChatRequest)
        priority = _priority(request)
        service = await self._engine.service()
        if not chat.stream:
            return JSONResponse(await service.chat_response(chat, priority))
        return await EventStream.begin(_chat_events(service, chat, priority))

    async def _completions(self, request: Request, body: bytes) -> Response:
        completion = parse(_json(body), CompletionRequest)
        priority = _priority(request)
        service = await self._engine.service()
        if not completion.stream:
            return JSONResponse(await service.completion_response(completion, priority))
        return await EventStream.begin(_completion_events(service, completion, priority))

    async def _tokenize(self, _: Request, body: bytes) -> Response:
        wanted = parse(_json(body), TokenizeRequest)
        return JSONResponse(await (await self._engine.service()).tokenize(wanted))

    async def _detokenize(self, _: Request, body: bytes) -> Response:
        wanted = parse(_json(body), DetokenizeRequest)
        return JSONResponse((await self._engine.service()).detokenize(wanted))


def _health_of(view: EngineView) -> dict[str, Any]:
    """An engine's part of the answer; with numbers where it has told any."""
    body: dict[str, Any] = {"name": view.name, "state": view.stage, "error": view.error}
    status = view.status
    if status is not None:
        body |= {
            "epoch": status.epoch,
            "shards": status.shards,
            "running": status.running,
            "waiting": status.waiting,
            "free_pages": status.free_pages,
            "total_pages": status.total_pages,
            "steps": status.steps,
            "context_length": status.context_length,
            "cached_pages": status.cached_pages,
            "preemptions": status.preemptions,
            "prompt_tokens": status.prompt_tokens,
            "cached_tokens": status.cached_tokens,
            "recoveries": status.recoveries,
        }
    return body


def error_response(error: RequestError) -> Response:
    """OpenAI's error object with its status."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def _priority(request: Request) -> int:
    """The header X-Flyray-Priority: 0, interactive, which is the default, or 1, behind all that is interactive."""
    value = request.headers.get("x-flyray-priority", "0")
    if value not in ("0", "1"):
        message = f"header 'X-Flyray-Priority': must be 0 or 1, not {value[:20]!r}"
        raise RequestError(message, param="X-Flyray-Priority", code="invalid_request")
    return int(value)


async def _body(request: Request) -> bytes:
    """Raises RequestError for one too large, but after its end: before it many a client does not listen."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= LARGEST_BODY:
            chunks.append(chunk)
    if size > LARGEST_BODY:
        message = f"the body has {size} bytes; at most {LARGEST_BODY} are taken"
        raise RequestError(message, status=413, code="body_too_large")
    return b"".join(chunks)


async def read_json_body(request: Request) -> Any:
    """The body, decoded. Raises RequestError."""
    return _json(await _body(request))


def _json(body: bytes) -> Any:
    try:
        text = body.decode(json.detect_encoding(body))
        found = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()  # raises for one without its other half
        return found
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from None


async def _answering(request: Request, handler: Callable[[Request, bytes], Coroutine[Any, Any, Response]]) -> Response:
    """Runs a handler; an error becomes its response, and a client that leaves ends the handler."""
    # The body is read before the watch begins: both take messages from the same channel.
    try:
        body = await _body(request)
    except RequestError as error:
        return error_response(error)
    work = asyncio.ensure_future(handler(request, body))
    watch = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return Response(status_code=CLIENT_CLOSED)
    except RequestError as error:
        return error_response(error)
    except RecursionError:  # JSON that could just be read, and not be written again
        return error_response(RequestError("the body is nested too deeply", code="invalid_json"))
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _chat_events(service: ChatService, request: ChatRequest, priority: int) -> AsyncGenerator[bytes, None]:
    head = AnswerHead.new("chatcmpl", service.model_name)
    begun: set[int] = set()
    usages: list[Usage] = []
    async with aclosing(await service.begin_chat(request, priority)) as deltas:
        async for delta in deltas:
            chunks = _chat_chunks(head, delta, bool(request.logprobs))
            if delta.index not in begun:
                begun.add(delta.index)
                chunks.insert(0, chat_chunk(head, delta.index, {"role": "assistant", "content": ""}, "", None))
            yield b"".join(map(event, chunks))
            if delta.usage:
                usages.append(delta.usage)
    end = DONE
    if request.include_usage:
        end = event(usage_chunk(head, "chat.completion.chunk", Usage.total(usages))) + DONE
    yield end


def _chat_chunks(head: AnswerHead, delta: ChatDelta, logprobs: bool) -> list[dict[str, Any]]:
    """A delta's chunk, and the reason of the end in a chunk of its own, as OpenAI sends it."""
    chunks = []
    body = delta_body(delta)
    if body or delta.logprobs:
        chunks.append(chat_chunk(head, delta.index, body, "", delta.logprobs if logprobs else None))
    if delta.finish:
        chunks.append(chat_chunk(head, delta.index, {}, delta.finish, None))
    return chunks


async def _completion_events(
    service: ChatService, request: CompletionRequest, priority: int
) -> AsyncGenerator[bytes, None]:
    head = AnswerHead.new("cmpl", service.model_name)
    usages: list[Usage] = []
    async with aclosing(await service.begin_completion(request, priority)) as deltas:
        async for delta in deltas:
            yield event(_text_chunk(head, delta, request.logprobs))
            if delta.usage:
                usages.append(delta.usage)
    end = DONE
    if request.include_usage:
        end = event(usage_chunk(head, "text_completion", Usage.total(usages))) + DONE
    yield end


def _text_chunk(head: AnswerHead, delta: TextDelta, logprobs: int | None) -> dict[str, Any]:
    return head.body("text_completion") | {"choices": [text_choice(delta, logprobs)]}
