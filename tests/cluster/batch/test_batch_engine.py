"""Batches on real engines: the right answers, a shard that is killed, a Ctrl-C, and going on afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from byte_model import CONTEXT, write_byte_model
from server_process import PATIENCE_S, ServerProcess, assert_nothing_left, until
from tiny_engine import tiny_config

from flyray.cluster.batch.job import BatchSummary, ServiceLost, run_batch
from flyray.cluster.batch.service import ServiceRunner
from flyray.cluster.engine_session import EngineSession, engine_session

MODEL = "byte-model"
TOKENS = 100


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("byte") / MODEL
    write_byte_model(path)
    return path


def line(number: int, **changes: Any) -> dict[str, Any]:
    """A chat or a completion of `TOKENS` greedy tokens, whatever the model would rather do."""
    body = {"model": MODEL, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    if number % 2:
        url, prompt = "/v1/completions", {"prompt": f"number {number}"}
    else:
        url, prompt = "/v1/chat/completions", {"messages": [{"role": "user", "content": f"number {number}"}]}
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body | prompt | changes}


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, lines)))


def texts(path: Path) -> dict[str, Any]:
    """What was written for each custom_id; each stands there once."""
    results = [json.loads(result) for result in path.read_text().splitlines()]
    found = {result["custom_id"]: result["response"]["body"].get("choices") for result in results}
    assert len(found) == len(results)
    return found


def run(
    checkpoint: Path, source: Path, target: Path, during: Callable[[EngineSession, BatchSummary], None]
) -> BatchSummary:
    async def main() -> BatchSummary:
        config = tiny_config(checkpoint, shards=2, kv_pages=256)
        async with engine_session(config, MODEL) as session:
            runner = ServiceRunner(session.service, session.client)
            return await run_batch(runner, source, target, concurrency=4, on_progress=partial(during, session))

    return asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_killed_shard_ends_the_job_and_another_engine_goes_on(
    tmp_path: Path, checkpoint: Path, local_cluster: None
) -> None:
    good = [line(number) for number in range(10)]
    bad = [line(90, temperature=9), line(91, max_tokens=CONTEXT), line(92, model="other"), line(93, n=17)]
    write(tmp_path / "in.jsonl", [*good[:5], *bad, *good[5:]])

    whole = run(checkpoint, tmp_path / "in.jsonl", tmp_path / "whole.jsonl", lambda session, summary: None)
    assert (whole.succeeded, whole.failed, whole.completion_tokens) == (10, 4, 10 * TOKENS)
    responses = [json.loads(each)["response"] for each in (tmp_path / "whole.jsonl").read_text().splitlines()]
    errors = sorted(each["body"]["error"]["message"] for each in responses if each["status_code"] != 200)
    beginnings = ["line 6: 'temperature'", "line 7: the prompt's", "line 8: there is no model 'other'", "line 9: 'n'"]
    for error, beginning in zip(errors, beginnings, strict=True):
        assert error.startswith(beginning)

    def kill(session: EngineSession, summary: BatchSummary) -> None:
        if summary.succeeded == 3:
            os.kill(session.engine.router.local_pids[1], signal.SIGKILL)

    with pytest.raises(ServiceLost, match=r"the engine stopped: .*shard 1"):
        run(checkpoint, tmp_path / "in.jsonl", tmp_path / "out.jsonl", kill)
    first = (tmp_path / "out.jsonl").read_bytes()
    done = texts(tmp_path / "out.jsonl")
    assert 3 <= sum(choices is not None for choices in done.values()) < 10

    rest = run(checkpoint, tmp_path / "in.jsonl", tmp_path / "out.jsonl", lambda session, summary: None)
    assert rest.skipped == len(done)
    assert (tmp_path / "out.jsonl").read_bytes().startswith(first)
    assert texts(tmp_path / "out.jsonl") == texts(tmp_path / "whole.jsonl")


def test_ctrl_c_leaves_a_file_that_goes_on_and_no_process(tmp_path: Path, checkpoint: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    # More than a busy machine can run before the signal is sent.
    lines = [line(number, max_tokens=400) for number in range(1000)]
    write(source, lines)
    (tmp_path / "config.yaml").write_text(
        f"model: {{path: {checkpoint}, precision: w4a8}}\nengine: {{shards: 2, kv_memory: 8 MiB}}\n"
    )
    command = ["batch", str(source), str(target), "--config", str(tmp_path / "config.yaml"), "--concurrency", "4"]
    job = ServerProcess(*command)
    try:
        until(lambda: target.exists() and target.read_bytes().count(b"\n") >= 3, "three results")
        processes, memory = job.descendants(), job.shared_memory()
        job.signal(signal.SIGINT)
        assert job.end() == 130, job.output
        assert "Run the same command to go on." in job.output
        assert len(processes) > 3
        assert_nothing_left(job, processes, memory)
    finally:
        job.close()
    done = texts(target)
    assert 3 <= len(done) < len(lines)
    rest = [each for each in lines if each["custom_id"] not in done][:3]
    write(source, [each for each in lines if each["custom_id"] in done] + rest)
    job = ServerProcess(*command, "--json", str(tmp_path / "figures.json"))
    try:
        assert job.end() == 0, job.output
        assert f"3 completed, 0 failed, 0 invalid, {len(done)} done before" in job.output
    finally:
        job.close()
    assert texts(target).keys() == done.keys() | {each["custom_id"] for each in rest}
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert {"name": "batch.completed", "value": 3, "unit": "lines"} in figures
