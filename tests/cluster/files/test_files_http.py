"""What the endpoints of files and batches take and refuse, as a client sees it."""

from __future__ import annotations

import asyncio
import resource
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flyray.cluster.files.batch_store import BatchStore
from flyray.cluster.files.http import METHODS, FilesHttp
from flyray.cluster.files.identity import FILE, new_id

LIMIT = 100_000
CONTENT = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n'
UPLOAD = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", CONTENT)}}
BATCH = {"endpoint": "/v1/completions", "completion_window": "24h"}


def ask(over: Path | FilesHttp, *asked: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
    """The answers of one front, a new one over a folder unless it is given, to requests in turn.

    Each is a method, a path below /v1 and httpx's arguments.
    """
    front = FilesHttp(BatchStore(over), "m", LIMIT) if isinstance(over, Path) else over

    async def answer(request: Request) -> Response:
        return await front.answer(request)

    app = Starlette(routes=[Route("/v1/{rest:path}", answer, methods=METHODS)])

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front/v1") as client:
            return [await client.request(method, path, **arguments) for method, path, arguments in asked]

    return asyncio.run(main())


def uploaded(root: Path) -> str:
    return ask(root, ("POST", "/files", UPLOAD))[0].json()["id"]


def error_of(response: httpx.Response) -> tuple[int, str | None, str]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    content = bytes(range(256)) * 300 + b"\r\n--"
    put = {"data": {"purpose": "batch"}, "files": {"file": ('ü"..\\/a.jsonl', content)}}
    name = ask(tmp_path, ("POST", "/files", put))[0].json()["id"]
    got, back, gone, again = ask(
        tmp_path,
        ("GET", f"/files/{name}", {}),
        ("GET", f"/files/{name}/content", {}),
        ("DELETE", f"/files/{name}", {}),
        ("GET", f"/files/{name}/content", {}),
    )
    assert (got.json()["bytes"], back.content) == (len(content), content)
    assert "\n" not in back.headers["content-disposition"]
    assert gone.json() == {"id": name, "object": "file", "deleted": True}
    assert error_of(again) == (404, "file_id", f"No such File object: {name}")


def test_the_file_may_come_before_its_purpose(tmp_path: Path) -> None:
    parts = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + CONTENT,
        b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbat',
        b"ch\r\n--b--\r\n",
    )

    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    headers = {"content-type": "multipart/form-data; boundary=b"}
    [whole] = ask(tmp_path, ("POST", "/files", {"content": body(), "headers": headers}))
    assert whole.json()["bytes"] == len(CONTENT)
    [torn] = ask(tmp_path, ("POST", "/files", {"content": b"".join(parts)[:-4], "headers": headers}))
    assert error_of(torn) == (400, None, "the body ends before its last boundary")
    [strange] = ask(tmp_path, ("POST", "/files", {"content": b"--c\r\n", "headers": headers}))
    assert error_of(strange)[2].startswith("the body is no multipart/form-data")


@pytest.mark.parametrize(
    ("arguments", "status", "param", "words"),
    [
        ({"json": {"purpose": "batch"}}, 400, None, "must be multipart/form-data with 'file' and 'purpose'"),
        (UPLOAD | {"data": {}}, 400, "purpose", "'purpose' is missing"),
        (UPLOAD | {"data": {"purpose": "vision"}}, 400, "purpose", "'purpose': 'vision' is not supported"),
        (UPLOAD | {"data": {"purpose": "b" * 99}}, 400, "purpose", "'purpose' must be 'batch'"),
        (UPLOAD | {"data": {"purpose": ["batch", "batch"]}}, 400, "purpose", "'purpose' is given twice"),
        (UPLOAD | {"data": {"purpos": "batch"}}, 400, "purpos", "unknown field 'purpos' (did you mean 'purpose'?)"),
        (UPLOAD | {"data": {"expires_after[seconds]": "9"}}, 400, "expires_after[seconds]", "kept until they are"),
        (UPLOAD | {"files": {"other": ("x", b"x")}}, 400, "other", "unknown field 'other'"),
        (UPLOAD | {"files": {"file": ("", b"x")}}, 400, "file", "with a name of 1 to 255 characters"),
        (UPLOAD | {"files": {"file": ("x", b"")}}, 400, "file", "'file' is empty"),
        (UPLOAD | {"files": {"file": ("x", b"x" * (LIMIT + 1))}}, 413, "file", "the most that serve.max_file_size"),
    ],
)
def test_an_upload_that_is_refused_leaves_nothing(
    tmp_path: Path, arguments: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    refused, listed = ask(tmp_path, ("POST", "/files", arguments), ("GET", "/files", {}))
    assert error_of(refused)[:2] == (status, param)
    assert words in error_of(refused)[2]
    assert listed.json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        [refused] = ask(tmp_path, ("POST", "/files", UPLOAD | {"files": {"file": ("x", b"x" * 60_000)}}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error_of(refused) == (507, None, "serve.files has no room: File too large")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_is_gone_is_an_error_of_the_server(tmp_path: Path) -> None:
    root = tmp_path / "files"
    front = FilesHttp(BatchStore(root), "m", LIMIT)
    shutil.rmtree(root)
    refused, missing = ask(front, ("GET", "/files", {}), ("GET", f"/files/{new_id(FILE)}", {}))
    assert error_of(refused) == (500, None, "serve.files cannot be used: No such file or directory")
    assert missing.status_code == 404


def test_without_a_folder_the_key_is_named() -> None:
    for path in ("/files", "/batches", f"/files/{new_id(FILE)}/content"):
        status, _, message = error_of(ask(FilesHttp(None, "m", LIMIT), ("GET", path, {}))[0])
        assert (status, "serve.files" in message) == (404, True)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/files?limit=0", "limit"),
        ("/files?limit=10001", "limit"),
        ("/files?limit=x", "limit"),
        ("/files?order=up", "order"),
        ("/files?after=../x", "after"),
        ("/files?page=2", "page"),
        ("/batches?limit=101", "limit"),
        ("/batches?order=asc", "order"),
        ("/batches?after=file-" + "0" * 24, "after"),
    ],
)
def test_a_list_asked_for_wrongly(tmp_path: Path, path: str, param: str) -> None:
    assert error_of(ask(tmp_path, ("GET", path, {}))[0])[:2] == (400, param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
        ({"priority": 1}, "priority"),
        ({"input_file_id": new_id(FILE)}, "input_file_id"),
        ({"input_file_id": "../../etc"}, "input_file_id"),
    ],
)
def test_an_order_that_is_refused(tmp_path: Path, changes: dict[str, Any], param: str) -> None:
    order = BATCH | {"input_file_id": uploaded(tmp_path)} | changes
    refused, listed = ask(tmp_path, ("POST", "/batches", {"json": order}), ("GET", "/batches", {}))
    assert error_of(refused)[:2] == (400, param)
    assert listed.json()["data"] == []


def test_any_front_may_be_asked(tmp_path: Path) -> None:
    name = uploaded(tmp_path)
    order = BATCH | {"input_file_id": name, "metadata": {"a": "b"}}
    batches = [ask(tmp_path, ("POST", "/batches", {"json": order}))[0].json() for _ in range(3)]
    [page] = ask(tmp_path, ("GET", f"/batches?limit=1&after={batches[2]['id']}", {}))
    assert (page.json()["data"], page.json()["has_more"]) == ([batches[1]], True)
    [refused] = ask(tmp_path, ("DELETE", f"/files/{name}", {}))
    assert error_of(refused)[:2] == (409, "file_id")
    cancelled = [ask(tmp_path, ("POST", f"/batches/{batch['id']}/cancel", {}))[0].json() for batch in batches]
    assert [batch["status"] for batch in cancelled] == ["cancelling"] * 3
    assert ask(tmp_path, ("GET", f"/batches/{batches[0]['id']}", {}))[0].json() == cancelled[0]
    [unknown] = ask(tmp_path, ("GET", "/batches/batch_x", {}))
    assert error_of(unknown)[:2] == (404, "batch_id")
    assert ask(tmp_path, ("DELETE", "/batches", {}))[0].status_code == 404
