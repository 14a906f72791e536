"""The runner over a folder: whole lives of batches, and what is left of one when something ends it in the middle."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from flyray.cluster.batch.line import Answer, BatchLine
from flyray.cluster.files import runner as runner_module
from flyray.cluster.files.batch_store import BatchStore
from flyray.cluster.files.file_store import BATCH_OUTPUT
from flyray.cluster.files.identity import Page
from flyray.cluster.files.runner import BatchRunner

URL = "/v1/completions"
PATIENCE_S = 60.0
OK = Answer(200, "req_1", {"usage": {"prompt_tokens": 3, "completion_tokens": 2}})


class Engine:
    """Answers lines, but those that `stuck` names; a body that asks for it is refused."""

    def __init__(self, *stuck: str) -> None:
        self.stuck, self.ran, self.open, self.most_open = stuck, [], 0, 0
        self.answer = OK

    async def run(self, line: BatchLine) -> Answer:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(0)
            if line.custom_id in self.stuck:
                await asyncio.Event().wait()
        finally:
            self.open -= 1
        self.ran.append(line.custom_id)
        return Answer(400, "req_2", {"error": {"message": "no"}}) if line.body.get("refuse") else self.answer


def line(name: str, **changes: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": URL, "body": {}} | changes)


def order(store: BatchStore, *lines: str, window_s: int = 3600) -> str:
    with store.files.create() as new:
        new.write("\n".join(lines).encode())
        file = new.keep("in.jsonl", "batch").id
    return store.create(file, URL, f"{window_s}s", window_s, None, "m")["id"]


def read(store: BatchStore, file: str | None) -> list[dict[str, Any]]:
    return [] if file is None else [json.loads(each) for each in store.files.content(file).read_text().splitlines()]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def ended(store: BatchStore, name: str) -> dict[str, Any]:
    await until(lambda: store.state(name).final)
    return store.body(name)


def running(store: BatchStore, engine: Engine, work: Callable[[], Coroutine[Any, Any, Any]], room: int = 4) -> Any:
    """What `work` returns, beside a runner that is cancelled when it does."""

    async def main() -> Any:
        runner = asyncio.create_task(BatchRunner(store, engine, room, poll_s=0.005).run())
        try:
            return await work()
        finally:
            runner.cancel()
            await asyncio.gather(runner, return_exceptions=True)

    return asyncio.run(main())


def test_a_batch_from_its_order_to_its_files(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    name = order(store, line("a"), "", line("b", body={"refuse": 1}), line("c"))
    body = running(store, Engine(), lambda: ended(store, name))
    assert body["status"] == "completed"
    assert body["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert body["usage"]["total_tokens"] == 10
    assert {each["custom_id"] for each in read(store, body["output_file_id"])} == {"a", "c"}
    [error] = read(store, body["error_file_id"])
    assert (error["custom_id"], error["response"]["status_code"]) == ("b", 400)
    files, _ = store.files.list(Page(10), BATCH_OUTPUT)
    assert {file.filename for file in files} == {f"{name}_output.jsonl", f"{name}_error.jsonl"}
    assert {path.name for path in (tmp_path / "batches" / name).iterdir()} == {"order.json", "state.json"}
    for file in files:
        store.delete_file(file.id)


def test_a_batch_without_errors_has_no_error_file(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    name = order(store, line("a"))
    body = running(store, Engine(), lambda: ended(store, name))
    assert body["error_file_id"] is None
    assert len(store.files.list(Page(10))[0]) == 2


@pytest.mark.parametrize(
    ("lines", "faults"),
    [
        ([], [("empty_file", None, None)]),
        (["{", line("a"), line("a")], [("invalid_json_line", 1, None), ("duplicate_custom_id", 3, "custom_id")]),
        ([line("a", url="/v1/chat/completions")], [("mismatched_url", 1, "url")]),
        ([line("a", extra=1), line("b", method="GET")], [("invalid_line", 1, "extra"), ("invalid_line", 2, "method")]),
        (["x"] * 103, [("invalid_json_line", n, None) for n in range(1, 101)] + [("more_invalid_lines", None, None)]),
    ],
)
def test_a_malformed_file_fails_before_anything_runs(tmp_path: Path, lines: list[str], faults: list[Any]) -> None:
    store, engine = BatchStore(tmp_path), Engine()
    name = order(store, *lines)
    body = running(store, engine, lambda: ended(store, name))
    assert (body["status"], engine.ran) == ("failed", [])
    assert [(each["code"], each["line"], each["param"]) for each in body["errors"]["data"]] == faults


def test_cancelling_keeps_what_is_finished(tmp_path: Path) -> None:
    store, engine = BatchStore(tmp_path), Engine("b")
    name = order(store, line("a"), line("b"), line("c"))

    async def work() -> dict[str, Any]:
        await until(lambda: len(engine.ran) == 2)
        store.cancel(name)
        return await ended(store, name)

    body = running(store, engine, work)
    assert (body["status"], engine.open) == ("cancelled", 0)
    assert {each["custom_id"] for each in read(store, body["output_file_id"])} == {"a", "c"}
    assert body["request_counts"] == {"total": 3, "completed": 2, "failed": 0}


def test_what_is_not_answered_in_time_expires(tmp_path: Path) -> None:
    now = 1_800_000_000.0
    store, engine = BatchStore(tmp_path, lambda: now), Engine("b")
    name = order(store, line("a"), line("b"), window_s=60)

    async def work() -> dict[str, Any]:
        nonlocal now
        await until(lambda: engine.ran == ["a"])
        now += 60
        return await ended(store, name)

    body = running(store, engine, work)
    assert (body["status"], body["expired_at"]) == ("expired", int(now))
    assert [each["custom_id"] for each in read(store, body["output_file_id"])] == ["a"]
    [late] = read(store, body["error_file_id"])
    assert (late["custom_id"], late["response"], late["error"]["code"]) == ("b", None, "batch_expired")
    assert body["request_counts"] == {"total": 2, "completed": 1, "failed": 1}


def test_batches_beside_each_other_share_the_room(tmp_path: Path) -> None:
    store, engine = BatchStore(tmp_path), Engine("stuck")
    slow = order(store, line("stuck"), *(line(f"s{number}") for number in range(20)))
    quick = order(store, *(line(f"q{number}") for number in range(20)))
    body = running(store, engine, lambda: ended(store, quick), room=3)
    assert body["request_counts"]["completed"] == 20
    assert not store.state(slow).final
    assert engine.most_open == 3


def test_the_next_runner_goes_on_and_runs_no_finished_line_again(tmp_path: Path) -> None:
    store, first, second = BatchStore(tmp_path), Engine("c", "d"), Engine()
    name = order(store, *map(line, "abcd"))

    async def interrupted() -> None:
        await until(lambda: len(first.ran) == 2)

    running(store, first, interrupted)
    results = store.results(name)
    finished = results.read_bytes()
    results.write_bytes(finished + b'{"id":"batch_req_torn')
    body = running(store, second, lambda: ended(store, name))
    assert sorted(second.ran) == ["c", "d"]
    assert store.files.content(body["output_file_id"]).read_bytes().startswith(finished)
    assert body["request_counts"] == {"total": 4, "completed": 4, "failed": 0}


def test_one_runner_at_a_time_has_a_folder(tmp_path: Path) -> None:
    store, first, second = BatchStore(tmp_path), Engine(), Engine()

    async def work() -> dict[str, Any]:
        waiting = asyncio.create_task(BatchRunner(store, second, 4, poll_s=0.005).run())
        await until(lambda: store.runner_lock.exists())
        for number in range(5):
            await ended(store, order(store, line(f"a{number}")))
        assert len(first.ran) + len(second.ran) == 5
        assert [] in (first.ran, second.ran)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return {}

    running(store, first, work)


def test_a_full_disk_stops_nothing_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "RETRY_S", 0.01)
    store, engine = BatchStore(tmp_path), Engine()
    engine.answer = Answer(200, "req_1", {"text": "x" * 20_000})
    name = order(store, *(line(f"a{number}") for number in range(5)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def work() -> dict[str, Any]:
        # As a full disk: the kernel writes what there is room for, and refuses the rest.
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            await until(lambda: len(engine.ran) > 5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return await ended(store, name)

    body = running(store, engine, work)
    assert body["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
    assert len({each["custom_id"] for each in read(store, body["output_file_id"])}) == 5
