"""Batch files: every line has one result, whatever the line holds and wherever an earlier run was cut off."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flyray.cluster.batch import line as batch_line
from flyray.cluster.batch.job import BatchSummary, ServiceLost, run_batch
from flyray.cluster.batch.line import Answer, BatchLine
from flyray.cluster.batch.output import BatchFileError, BatchOutput


class Echo:
    """Answers with the last message, in an order other than the input's; a body that asks for it is refused.

    After `lives` answers the service is gone.
    """

    def __init__(self, lives: int = 1_000_000) -> None:
        self.lives = lives
        self.ran: list[str] = []
        self.open = 0
        self.most_open = 0

    async def run(self, line: BatchLine) -> Answer:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        for _ in range(line.number * 7 % 5):
            await asyncio.sleep(0)
        self.open -= 1
        if self.lives == 0:
            raise ServiceLost("the engine died: shard 1 is gone")
        self.lives -= 1
        self.ran.append(line.custom_id)
        if line.body.get("refuse"):
            return Answer(400, "req_1", {"error": {"message": "refuse: unknown field", "param": "refuse"}})
        text = line.body["messages"][-1]["content"]
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        return Answer(200, "req_1", {"choices": [{"message": {"content": text}}], "usage": usage})


def request(custom_id: str, text: str = "hi", **body: Any) -> str:
    content = {"messages": [{"role": "user", "content": text}], **body}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": content}
    return json.dumps(line, ensure_ascii=False)


def run(folder: Path, runner: Echo, **options: Any) -> BatchSummary:
    return asyncio.run(run_batch(runner, folder / "in.jsonl", folder / "out.jsonl", concurrency=4, **options))


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]


def test_results_in_openai_form(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join([request("a", "eins"), "", request("b", "zwei", refuse=True)]))
    summary = run(tmp_path, Echo())
    assert (summary.succeeded, summary.failed, summary.invalid, summary.skipped) == (1, 1, 0, 0)
    assert (summary.prompt_tokens, summary.completion_tokens) == (3, 2)
    assert summary.done_bytes == summary.total_bytes - 1  # the empty line
    by_id = {result["custom_id"]: result for result in results(tmp_path)}
    assert set(by_id["a"]) == {"id", "custom_id", "response", "error"}
    assert by_id["a"]["error"] is None
    assert by_id["a"]["response"]["status_code"] == 200
    assert by_id["a"]["response"]["request_id"] == "req_1"
    assert by_id["a"]["response"]["body"]["choices"][0]["message"]["content"] == "eins"
    assert by_id["b"]["response"]["status_code"] == 400
    assert by_id["b"]["response"]["body"]["error"]["message"] == "line 3: refuse: unknown field"
    assert by_id["a"]["id"] != by_id["b"]["id"]


BAD_LINES = [
    ('{"custom_id": "x", ', "line 2: not valid JSON", None),
    ('["x"]', "line 2: must be a JSON object", None),
    (request("x")[:-1] + ', "metod": 1}', "line 2: metod: unknown field", "metod"),
    (request("x").replace('"custom_id": "x", ', ""), "line 2: custom_id: must be a non-empty string", "custom_id"),
    (request("x").replace('"custom_id": "x"', '"custom_id": 5'), "line 2: custom_id: must be", "custom_id"),
    (request(""), "line 2: custom_id: must be a non-empty string", "custom_id"),
    (request("x").replace('"POST"', '"GET"'), 'line 2: method: must be "POST", not "GET"', "method"),
    (request("x").replace("chat/completions", "embeddings"), 'not "/v1/embeddings"', "url"),
    (request("x").split(', "body"')[0] + ', "body": []}', "line 2: body: must be an object", "body"),
    (request("x", stream=True), "line 2: body.stream: a batch line cannot be streamed", "body.stream"),
    (request("first"), "line 2: custom_id: 'first' stands already on line 1", "custom_id"),
    (request("x", temperature=float("nan")), "line 2: not valid JSON: NaN", None),
    ("[" * 100_000, "line 2: not valid JSON", None),
]


@pytest.mark.parametrize(("line", "words", "param"), BAD_LINES)
def test_bad_line_gets_an_error_line_and_the_job_goes_on(
    tmp_path: Path, line: str, words: str, param: str | None
) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join([request("first"), line, request("last")]) + "\n")
    summary = run(tmp_path, Echo())
    assert (summary.succeeded, summary.failed, summary.invalid) == (2, 0, 1)
    found = results(tmp_path)
    assert {result["custom_id"] for result in found} == {"first", "last", None}
    [bad] = [result for result in found if result["error"]]
    assert bad["response"] is None
    assert words in bad["error"]["message"]
    assert bad["error"]["param"] == param
    assert bad["error"]["line"] == 2
    again = run(tmp_path, Echo())
    assert (again.succeeded, again.invalid, again.skipped) == (0, 0, 3)
    assert results(tmp_path) == found


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + request("a").encode() + b'\n{"custom_id": "\xff"}\r\n')
    assert (run(tmp_path, Echo()).succeeded, len(results(tmp_path))) == (1, 2)
    assert "line 2: not UTF-8 at byte 15" in (tmp_path / "out.jsonl").read_text()


def test_line_too_long_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_line, "LONGEST_LINE", 1000)
    (tmp_path / "in.jsonl").write_text("\n".join([request("a"), request("b", "x" * 5000), request("c")]))
    with (tmp_path / "in.jsonl").open("rb") as file:
        lines = list(batch_line.read_lines(file))
    assert max(len(line.data) for line in lines) <= 1001
    assert sum(line.length for line in lines) == (tmp_path / "in.jsonl").stat().st_size
    assert (run(tmp_path, Echo()).succeeded, "line 2: is 51" in (tmp_path / "out.jsonl").read_text()) == (2, True)


def test_at_most_concurrency_requests_run_at_once(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(request(f"id-{number}") for number in range(40)))
    runner = Echo()
    run(tmp_path, runner)
    assert runner.most_open == 4


LINE = st.one_of(
    st.builds(request, st.sampled_from("abcdef"), st.text(max_size=8)),
    st.builds(request, st.text(min_size=1, max_size=3), st.text(max_size=8), refuse=st.booleans()),
    st.sampled_from(["", "{}", "not JSON", '{"custom_id": "a"}']),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINE, max_size=8), cuts=st.lists(st.floats(0, 1), max_size=3), data=st.data())
def test_any_crash_point_resumes_to_one_result_a_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cuts: list[float], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("job")
    (folder / "in.jsonl").write_text("\n".join(line.replace("\n", " ") for line in lines))
    run(folder, Echo())
    whole = sorted(json.dumps({**result, "id": ""}, sort_keys=True) for result in results(folder))
    for cut in cuts:
        content = (folder / "out.jsonl").read_bytes()
        (folder / "out.jsonl").write_bytes(content[: round(cut * len(content))])
        kept = (folder / "out.jsonl").read_bytes()
        runner = Echo(data.draw(st.integers(0, 8)))
        with contextlib.suppress(ServiceLost):
            run(folder, runner)
        assert (folder / "out.jsonl").read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    last = Echo()
    run(folder, last)
    assert sorted(json.dumps({**result, "id": ""}, sort_keys=True) for result in results(folder)) == whole
    ids = [result["custom_id"] for result in results(folder) if result["custom_id"] is not None]
    assert len(ids) == len(set(ids))
    nothing = Echo()
    run(folder, nothing)
    assert nothing.ran == []


def test_every_prefix_of_a_real_output(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join([request("a", "ä\u2028"), "oops", request("b", refuse=True)]))
    run(tmp_path, Echo())
    content = (tmp_path / "out.jsonl").read_bytes()
    for length in range(len(content) + 1):
        (tmp_path / "out.jsonl").write_bytes(content[:length])
        run(tmp_path, Echo())
        assert sorted(str(result["custom_id"]) for result in results(tmp_path)) == ["None", "a", "b"], length


def test_errors_stay_unless_they_are_to_be_retried(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join([request("a"), request("b", refuse=True), "oops"]))
    run(tmp_path, Echo())
    (tmp_path / "in.jsonl").write_text("\n".join([request("a"), request("b"), request("c")]))
    runner = Echo()
    summary = run(tmp_path, runner)
    assert (runner.ran, summary.skipped) == (["c"], 2)
    runner = Echo()
    summary = run(tmp_path, runner, retry_errors=True)
    assert (runner.ran, summary.skipped, summary.succeeded) == (["b"], 2, 1)
    assert sorted(result["custom_id"] for result in results(tmp_path)) == ["a", "b", "c"]
    assert all(result["response"]["status_code"] == 200 for result in results(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_results_of_other_requests_are_kept_and_counted(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(request("a"))
    run(tmp_path, Echo())
    (tmp_path / "in.jsonl").write_text(request("b"))
    assert run(tmp_path, Echo()).foreign == 1
    assert [result["custom_id"] for result in results(tmp_path)] == ["a", "b"]


def test_a_file_that_is_no_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(request("a"))
    for content in [
        "my notes\nand more\n",
        '{"custom_id": "a"}\n',
        "[1]\n",
        '{"id":1,"custom_id":1,"response":1,"error":1}\n',
        "one line of notes",
        '{"id":"mine","custom_id":"a"}',
    ]:
        (tmp_path / "out.jsonl").write_text(content)
        with pytest.raises(BatchFileError, match=r"out.jsonl line 1 is not a batch result"):
            run(tmp_path, Echo())
        assert (tmp_path / "out.jsonl").read_text() == content


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(BatchFileError, match=r"in.jsonl is not a file"):
        run(tmp_path, Echo())
    (tmp_path / "in.jsonl").write_text(request("a"))
    (tmp_path / "out.jsonl").symlink_to("in.jsonl")
    with pytest.raises(BatchFileError, match="named as input and as output"):
        run(tmp_path, Echo())
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl").mkdir()
    with pytest.raises(BatchFileError, match="cannot be written"):
        run(tmp_path, Echo())


def test_two_jobs_cannot_write_one_file(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(request("a"))
    with BatchOutput(tmp_path / "out.jsonl"), pytest.raises(BatchFileError, match="written by another batch job"):
        run(tmp_path, Echo())
    assert run(tmp_path, Echo()).succeeded == 1


def test_lost_service_keeps_what_was_finished(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(request(f"id-{number}") for number in range(20)))
    with pytest.raises(ServiceLost, match="the engine died: shard 1 is gone"):
        run(tmp_path, Echo(lives=7))
    first = results(tmp_path)
    assert len(first) == 7
    runner = Echo()
    summary = run(tmp_path, runner)
    assert (summary.skipped, summary.succeeded) == (7, 13)
    assert results(tmp_path)[:7] == first
