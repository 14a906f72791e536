"""`flyray trace`: the file that it writes, and the costs that the plan is made of."""

import json
import subprocess

import pytest
from server_process import FLYRAY

from flyray.actors.engine_config import EngineConfig
from flyray.actors.request import TracedStep
from flyray.actors.stage_program import make_stage
from flyray.actors.step_plan import StageTime
from flyray.cluster.trace_command import LINK_US, StageCosts, TraceError, TraceSettings, room


def test_costs_are_medians_and_waiting_does_not_count():
    def step(number: int, shard: int, attention: int, experts: int) -> TracedStep:
        times = (StageTime("attention.0.0", 0, attention), StageTime("experts.1.0", attention, attention + experts))
        return TracedStep(number, shard, times)

    steps = [step(0, 0, 1000, 9000), step(0, 1, 3000, 2000), step(1, 0, 2000, 4000), step(1, 1, 2000, 8000)]
    costs = StageCosts(steps)
    assert costs("attention", make_stage("attention", 0, 0), 0) == 2.0
    assert costs("experts", make_stage("experts", 1, 0), 1) == 3.0
    assert costs("link.dispatch", make_stage("dispatch", 1, 0), 0) == LINK_US
    with pytest.raises(TraceError, match="no stages"):
        StageCosts([])


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
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
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
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "there is no such folder" in run.stderr
