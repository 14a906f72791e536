"""`flyray serve --demo` as its users meet it: a process, clients that come and go, shards that die, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections import Counter

import httpx
import openai
import pytest
from batches import ended, line, order, results
from long_answers import Answer, Asking
from prometheus_client.parser import text_string_to_metric_families
from questions import MODEL, QUESTION, chat
from server_process import FLYRAY, PATIENCE_S, ServerProcess, assert_nothing_left, until
from standing import standing
from typer.testing import CliRunner

from flyray.cluster.cli import app
from flyray.cluster.figures import read_figures

LONGEST = 3000
# Answers that take half a minute and more, so that they run still whatever a busy machine does meanwhile.
LONG = {"n": 16, "max_tokens": LONGEST, "extra_body": {"ignore_eos": True}}


def running(http: httpx.Client) -> int:
    return http.get("/health").json()["engines"][0]["running"]


def steps(http: httpx.Client) -> int:
    return http.get("/health").json()["engines"][0]["steps"]


def process_named(server: ServerProcess, name: str) -> int:
    """The first whose command begins so, folders left out."""
    commands = {pid: command.split("\0")[0] for pid, command in server.descendants().items()}
    return next(pid for pid, command in commands.items() if os.path.basename(command).startswith(name))


def test_the_precision_plan_is_printed_before_ready(server):
    lines = server.output.splitlines()
    ready = next(i for i, line in enumerate(lines) if line.startswith("ready in"))
    assert any("routed experts" in line and "INT8 per token" in line for line in lines[:ready])


def test_a_client_that_leaves_cancels_its_stream(client, http):
    before = steps(http)
    stream = client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, **LONG)
    next(iter(stream))
    assert running(http) > 0
    stream.close()
    until(lambda: running(http) == 0, "a stream's request is cancelled")
    assert steps(http) - before < LONGEST


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_client_that_leaves_cancels_its_request(http, port, size):
    # The body goes out after the head, as most clients send it: HAProxy must notice the client's leaving all the same.
    request = {"model": MODEL, "messages": QUESTION, "ignore_eos": True, "n": 16, "max_tokens": LONGEST}
    body = json.dumps(request | {"user": "u" * size}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: flyray\r\nContent-Length: {len(body)}\r\n\r\n"
    before = steps(http)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode())
        assert running(http) == 0
        connection.sendall(body)
        until(lambda: running(http) > 0, "the request runs")
    until(lambda: running(http) == 0, "a request is cancelled")
    assert steps(http) - before < LONGEST


def metrics(http: httpx.Client) -> dict[str, float]:
    """Name, with the reason of an end, to value; sums over the front and what runs batches."""
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            sums[sample.name + sample.labels.get("finished_reason", "")] += sample.value
    return sums


def test_metrics_count_what_a_client_met(client, http):
    before = metrics(http)
    usage = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0).usage
    after = metrics(http)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["vllm:time_to_first_token_seconds_count"] == grown["vllm:request_success_totalstop"] == 1
    assert grown["vllm:prompt_tokens_total"] == grown["vllm:prefix_cache_queries_total"] == usage.prompt_tokens
    # A stop token is counted in the usage of no answer, as it is not shown.
    assert grown["vllm:generation_tokens_total"] == usage.completion_tokens
    assert grown["vllm:inter_token_latency_seconds_count"] == usage.completion_tokens - 1
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1


def test_a_full_queue_is_a_429_that_says_when_to_come_back(http):
    prompts = {"model": MODEL, "prompt": ["The"] * 1000, "max_tokens": 800, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=prompts) as stream:
        pieces = stream.iter_raw()  # kept: httpx closes a stream whose iterator is gone
        next(pieces)
        refusal = http.post("/v1/completions", json={"model": MODEL, "prompt": ["The"] * 1000, "max_tokens": 1})
        assert refusal.status_code == 429
        assert refusal.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refusal.headers["retry-after"]) <= 120
    until(lambda: http.get("/health").json()["engines"][0]["waiting"] == 0, "the queue is cancelled")
    assert chat(http, max_tokens=1).status_code == 200


def test_bench_serve_loads_the_server(server, port, tmp_path):
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    arguments = ["bench", "serve", f"http://127.0.0.1:{port}", "--runs", "1", "--duration", "1"]
    sizes = ["--concurrency", "1,4", "--prompt-tokens", "8", "--max-tokens", "8", "--shared-prefix", "200"]
    done = CliRunner().invoke(app, [*arguments, *sizes, "--json", str(figures), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    found = read_figures(figures)
    for level in ("c1", "c4"):
        assert found[f"serve_errors.{level}"].value == 0
        assert found[f"serve_tok_s.{level}"].value > 0
        assert 0 < found[f"ttft.p50.{level}"].value <= found[f"ttft.p99.{level}"].value
        assert found[f"prefix_computed.{level}"].value >= 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in done.output
    done = CliRunner().invoke(app, [*arguments, "--rate", "20", "--prompt-tokens", "100000"])
    assert done.exit_code == 1
    assert "r20: no request was answered: {'400: context_length_exceeded'" in done.output


def test_chat_in_the_terminal(server, port):
    talk = "What is 125 + 377?\n/new\n/quit\n"
    url = f"http://127.0.0.1:{port}"
    command = [FLYRAY, "chat", url, "--temperature", "0"]
    run = subprocess.run(command, input=talk, capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 0
    assert MODEL in run.stdout
    assert "\n502\n" in run.stdout
    assert "tokens/s)" in run.stdout


def test_the_port_of_a_running_server_is_refused_at_once(server, port):
    run = subprocess.run(
        [FLYRAY, "serve", "--demo", "--port", str(port)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert run.returncode == 1
    assert run.stderr == f"flyray: cannot listen at 127.0.0.1 port {port}: Address already in use\n"


def test_a_batch_of_openai_s_client_from_its_upload_to_its_files(client):
    batch = order(client, line("a", "What is 125 + 377?"), line("b", "hi", min_p=7), metadata={"for": "tests"})
    assert (batch.status, batch.metadata) == ("validating", {"for": "tests"})
    done = ended(client, batch)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 1)
    answer = results(client, done.output_file_id)["a"]["response"]
    alone = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert answer["body"]["choices"][0]["message"] == alone.choices[0].message.to_dict()
    assert done.usage.output_tokens == alone.usage.completion_tokens
    assert results(client, done.error_file_id)["b"]["response"]["body"]["error"]["param"] == "min_p"
    assert done.id in [each.id for each in client.batches.list(limit=1)]
    files = [done.input_file_id, done.output_file_id, done.error_file_id]
    assert set(files) <= {each.id for each in client.files.list(limit=2)}
    for file in files:
        assert client.files.delete(file).deleted
    with pytest.raises(openai.NotFoundError, match="No such File object"):
        client.files.retrieve(done.output_file_id)


def test_a_batch_is_cancelled_while_others_run(client):
    # Fewer lines than the engine has room for, so that the others need not wait for one of them to end.
    long = order(client, *(line(str(number), "hi", max_tokens=LONGEST, ignore_eos=True) for number in range(16)))
    bad, short = order(client, line("a", "hi"), "{"), order(client, line("a", "hi", max_tokens=4))
    assert [each.line for each in ended(client, bad).errors.data] == [2]
    assert ended(client, short).status == "completed"
    with pytest.raises(openai.ConflictError, match="cancel that first"):
        client.files.delete(long.input_file_id)
    assert client.batches.cancel(long.id).status == "cancelling"
    over = ended(client, long)
    assert over.status == "cancelled"
    assert len(results(client, over.output_file_id)) == over.request_counts.completed < 16


def test_a_killed_process_of_batches_is_replaced_and_goes_on(server, client):
    batch = order(client, *(line(str(number), f"What is {number} + 9?", max_tokens=60) for number in range(48)))
    pattern = f"fr-*/files/batches/{batch.id}/results.jsonl"
    until(lambda: any(path.read_bytes().count(b"\n") > 2 for path in server.folder.glob(pattern)), "three results")
    with standing(pid := process_named(server, "ray::ServeReplica:flyray:BatchReplica")):
        [path] = server.folder.glob(pattern)
        finished = path.read_bytes()
        os.kill(pid, signal.SIGKILL)
    done = ended(client, batch)
    assert (done.status, done.request_counts.completed) == ("completed", 48)
    assert finished[: finished.rindex(b"\n")].decode() in client.files.content(done.output_file_id).text
    assert len(results(client, done.output_file_id)) == 48


@pytest.fixture(scope="module")
def alone(http) -> dict[str, Answer]:
    """What is answered where nothing dies."""
    return Asking(http).answers()


def test_a_killed_shard_is_a_pause(server, client, http, alone):
    endless = client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, **LONG | {"n": 2})
    before, asking = metrics(http), Asking(http)
    with standing(process_named(server, "raylet")):  # so that nothing is replaced before it is looked at
        os.kill(process_named(server, "ray::ShardActor"), signal.SIGKILL)
        until(lambda: http.get("/health").status_code == 503, "an engine that lacks a shard is not ready")
        health = http.get("/health").json()
        assert health["status"] == health["engines"][0]["state"] == "recovering"
        assert re.search(r"shard \d is gone", health["error"])
    assert asking.answers() == alone
    after = metrics(http)
    assert after["flyray:recoveries_total"] == before["flyray:recoveries_total"] + 1
    endless.close()


def test_a_killed_replica_is_a_pause(server, client, http, alone):
    endless = client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, **LONG | {"n": 2})
    before, asking = metrics(http), Asking(http)
    with standing(process_named(server, "ray::ServeController")):  # so that nothing is replaced before it is looked at
        os.kill(process_named(server, "ray::ServeReplica:flyray:EngineReplica"), signal.SIGKILL)
        until(lambda: http.get("/health").status_code == 503, "a dead engine is not ready")
    assert asking.answers() == alone
    until(lambda: metrics(http)["flyray:replays_total"] > before["flyray:replays_total"], "the endless one goes on too")
    endless.close()
    until(lambda: running(http) == 0, "what its client left is not gone on with")
    after = metrics(http)
    ended = "vllm:request_success_totallength"
    lengths = [choice.finish for choices, _ in alone.values() for choice in choices].count("length")
    # The endless one's two answers came to an end if this process stood still for long.
    assert lengths <= after[ended] - before[ended] <= lengths + 2, "each is counted once"
    assert http.get("/health").status_code == 200


def test_sigterm_leaves_nothing(server, client):
    stream = client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, **LONG)
    next(iter(stream))
    processes, memory = server.descendants(), server.shared_memory()
    assert any("haproxy" in command for command in processes.values())
    assert any(command.startswith("ray::ShardActor") for command in processes.values())
    server.signal(signal.SIGTERM)
    assert server.end() == 0
    assert_nothing_left(server, processes, memory)
