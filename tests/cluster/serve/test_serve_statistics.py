"""A served model calibrates itself: statistics are complete when `flyray serve` has ended."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
from byte_model import write_byte_model
from server_process import PATIENCE_S, ServerProcess

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.statistics import Statistics

FIXED = {"temperature": 0.0, "max_tokens": 12}


def test_serving_gathers_statistics(tmp_path: Path, port: int) -> None:
    write_byte_model(tmp_path / "model")
    (tmp_path / "flyray.yaml").write_text(
        f"model: {{path: model, precision: w4a8}}\n"
        f"engine: {{shards: 2, kv_memory: 16 MiB, statistics: statistics, moments_block: 16}}\n"
        f"serve: {{port: {port}}}\n"
    )
    server = ServerProcess("serve", str(tmp_path / "flyray.yaml"))
    try:
        server.wait_for("ready in")
        run = 0
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=PATIENCE_S) as client:
            for text in ("hello", "a longer text, to be continued"):
                body = {"model": "model", "prompt": text, "ignore_eos": True, **FIXED}
                usage = client.post("/completions", json=body).raise_for_status().json()["usage"]
                run += usage["prompt_tokens"] + usage["completion_tokens"] - 1
            message = {"role": "user", "content": "hello"}
            body = {"model": "model", "messages": [message], "ignore_eos": True, **FIXED}
            usage = client.post("/chat/completions", json=body).raise_for_status().json()["usage"]
            run += usage["prompt_tokens"] + usage["completion_tokens"] - 1
        server.signal(signal.SIGINT)
        assert server.end() == 0
    finally:
        server.close()
    found = Statistics.open(tmp_path / "statistics")
    # A sequence may have had one step too many on its way when it ended, never more.
    assert run <= found.tokens <= run + 3
    found.check(Checkpoint(tmp_path / "model"))
    assert found.layer(1).input_moments is not None
