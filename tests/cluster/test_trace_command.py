"""`flyray trace`: the file that it writes, and how long its sequences are."""

import json
import subprocess

import pytest
from server_process import FLYRAY, PATIENCE_S

from flyray.actors.engine_config import EngineConfig
from flyray.cluster.trace_command import TraceError, TraceSettings, room


def test_sequences_are_as_long_as_fits_all_at_once():
    engine = EngineConfig("model", shards=2, page_size=16, max_sequences=9)
    assert room(engine, 100, 4096, TraceSettings(steps=16, sequences=8, prompt_tokens=64)) == 25 * 16 - 64
    assert room(engine, 100, 200, TraceSettings(steps=16, sequences=8, prompt_tokens=64)) == 200 - 64
    with pytest.raises(TraceError, match="do not fit the KV cache of 30 pages a shard"):
        room(engine, 30, 4096, TraceSettings(steps=16, sequences=8, prompt_tokens=64))
    with pytest.raises(TraceError, match=r"10 sequences: engine\.max_sequences is 9"):
        room(engine, 1000, 4096, TraceSettings(sequences=10))


def test_the_file_has_planned_and_measured_steps(tmp_path):
    output = tmp_path / "trace.json"
    command = [FLYRAY, "trace", output, "--demo", "--steps", "4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 0, run.stderr
    assert "4 steps of 8 sequences on 2 shards" in run.stdout
    events = json.loads(output.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert [name.partition(",")[0] for name in names] == [
        "planned colocated 0",
        "planned colocated 1",
        "measured shard 0",
        "measured shard 1",
    ]
    stages = [event for event in events if event["ph"] == "X"]
    steps = {event["args"]["step"] for event in stages if "step" in event["args"]}
    assert len(steps) == 4
    planned = {event["name"] for event in stages if "program" in event["args"] and "link" not in event["name"]}
    measured = {event["name"] for event in stages if "step" in event["args"]}
    assert measured == planned


def test_a_folder_that_is_not_there_is_refused_at_once(tmp_path):
    command = [FLYRAY, "trace", tmp_path / "none" / "trace.json", "--demo"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 1
    assert "there is no such folder" in run.stderr
