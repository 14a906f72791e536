"""OpenAI's /v1/files and /v1/batches over a `BatchStore`. No Ray in here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response

from ..front.errors import RequestError
from ..front.http import CLIENT_CLOSED, error_response, read_json_body
from ..front.requests import parse
from .batch_store import BatchRefused, BatchStore
from .identity import BATCH, FILE
from .requests import BatchRequest, batches_page, files_page
from .upload import Upload, disk_error

T = TypeVar("T")

METHODS = ["GET", "POST", "DELETE"]


class FilesHttp:
    """The handlers. store: None where the server keeps no files; model_name: the served model; max_file_size: bytes."""

    def __init__(self, store: BatchStore | None, model_name: str, max_file_size: int) -> None:
        self._kept = store
        self._model_name = model_name
        self._max_file_size = max_file_size

    async def answer(self, request: Request) -> Response:
        """Any request below /v1/files and /v1/batches."""
        try:
            return await self._route(request)
        except RequestError as error:
            return error_response(error)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        except OSError as error:
            return error_response(disk_error(error))

    async def _route(self, request: Request) -> Response:
        match request.method, request.url.path.removeprefix("/v1/").split("/"):
            case "POST", ["files"]:
                return await self._upload(request)
            case "GET", ["files"]:
                return await self._list_files(request)
            case "GET", ["files", name]:
                return JSONResponse((await self._file(name, self._store.files.get)).body())
            case "GET", ["files", name, "content"]:
                return await self._content(name)
            case "DELETE", ["files", name]:
                return await self._delete(name)
            case "POST", ["batches"]:
                return await self._create_batch(request)
            case "GET", ["batches"]:
                return await self._list_batches(request)
            case "GET", ["batches", name]:
                return JSONResponse(await self._batch(name, self._store.body))
            case "POST", ["batches", name, "cancel"]:
                return JSONResponse(await self._batch(name, self._store.cancel))
        message = f"there is no {request.method} {request.url.path} here"
        raise RequestError(message, status=404, code="not_found")

    @property
    def _store(self) -> BatchStore:
        if self._kept is None:
            message = "this server keeps no files; the configuration's key serve.files names a folder for them"
            raise RequestError(message, status=404, code="files_disabled")
        return self._kept

    async def _upload(self, request: Request) -> Response:
        creating = self._store.files.create()
        new = await asyncio.to_thread(creating.__enter__)
        try:
            upload = Upload(request.headers.get("content-type", ""), new, self._max_file_size)
            await upload.read(request.stream())
            stored = await asyncio.to_thread(new.keep, upload.filename, upload.purpose)
        finally:
            # Also when it is cancelled: what was written must go.
            await asyncio.shield(asyncio.to_thread(creating.__exit__, None, None, None))
        return JSONResponse(stored.body())

    async def _list_files(self, request: Request) -> Response:
        page, purpose = files_page(request.query_params, FILE)
        files, more = await asyncio.to_thread(self._store.files.list, page, purpose)
        return _list([file.body() for file in files], more)

    async def _content(self, name: str) -> Response:
        stored = await self._file(name, self._store.files.get)
        path = await self._file(name, self._store.files.content)
        return FileResponse(path, media_type="application/octet-stream", filename=stored.filename)

    async def _delete(self, name: str) -> Response:
        try:
            await self._file(name, self._store.delete_file)
        except BatchRefused as error:
            raise RequestError(str(error), status=409, param="file_id", code="file_in_use") from None
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    async def _create_batch(self, request: Request) -> Response:
        store = self._store
        asked = parse(await read_json_body(request), BatchRequest)
        try:
            body = await asyncio.to_thread(
                store.create,
                asked.input_file_id,
                asked.endpoint,
                asked.completion_window,
                asked.window_s,
                asked.metadata,
                self._model_name,
            )
        except LookupError:
            raise _no_file(asked.input_file_id, "input_file_id", 400) from None
        except BatchRefused as error:
            raise RequestError(str(error), param="input_file_id", code="invalid_request") from None
        return JSONResponse(body)

    async def _list_batches(self, request: Request) -> Response:
        page = batches_page(request.query_params, BATCH)
        return _list(*await asyncio.to_thread(self._store.list, page))

    async def _file(self, name: str, work: Callable[[str], T]) -> T:
        try:
            return await asyncio.to_thread(work, name)
        except LookupError:
            raise _no_file(name, "file_id", 404) from None

    async def _batch(self, name: str, work: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(work, name)
        except LookupError:
            message = f"No batch found with id '{name}'."
            raise RequestError(message, status=404, param="batch_id", code="not_found") from None
        except BatchRefused as error:
            raise RequestError(str(error), status=409, param="batch_id", code="not_cancellable") from None


def _list(bodies: list[dict[str, Any]], more: bool) -> Response:
    first, last = (bodies[0]["id"], bodies[-1]["id"]) if bodies else (None, None)
    return JSONResponse({"object": "list", "data": bodies, "first_id": first, "last_id": last, "has_more": more})


def _no_file(name: str, param: str, status: int) -> RequestError:
    return RequestError(f"No such File object: {name}", status=status, param=param, code="not_found")
