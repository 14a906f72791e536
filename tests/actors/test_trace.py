"""Trace files hold every planned and measured stage where Perfetto looks for it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.request import TracedStep
from flyray.actors.sequence import LayerPlan, StageProgram, sequence
from flyray.actors.simulate import simulate
from flyray.actors.stage_program import SIGNATURES
from flyray.actors.step_plan import StageTime
from flyray.actors.trace import write_trace

COSTS = dict.fromkeys([*SIGNATURES, "link.dispatch", "link.combine"], 4.0)
PROGRAM = sequence(LayerPlan(2, 1), "colocated", 1)


def measured(program: StageProgram, step: int, shard: int, begin: int, each: int = 1000) -> TracedStep:
    """A step whose stages take `each` nanoseconds, one after another from `begin`."""
    stages = program.stages["colocated"]
    times = [StageTime(stage.name, begin + i * each, begin + (i + 1) * each) for i, stage in enumerate(stages)]
    return TracedStep(step, shard, tuple(times))


def written(path: Path, steps: list[TracedStep], shards: int = 2) -> dict[str, list[dict[str, Any]]]:
    """The file's interval events by the name of their process, after checking every event's form."""
    write_trace(path, simulate(PROGRAM, COSTS, shards), steps)
    document = json.loads(path.read_text())
    assert set(document) == {"displayTimeUnit", "traceEvents"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    processes: dict[int, str] = {}
    threads: set[tuple[int, int]] = set()
    tracks: dict[str, list[dict[str, Any]]] = {}
    for event in document["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert set(event) == {"ph", "name", "pid", "tid", "args"}
            if event["name"] == "process_name":
                assert event["pid"] not in processes
                processes[event["pid"]] = event["args"]["name"]
            else:
                assert event["name"] == "thread_name"
                threads.add((event["pid"], event["tid"]))
            continue
        assert event["ph"] == "X"
        assert set(event) == {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"}
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert (event["pid"], event["tid"]) in threads
        tracks.setdefault(processes[event["pid"]], []).append(event)
    return tracks


def test_planned_and_measured_stand_side_by_side(tmp_path: Path) -> None:
    steps = [measured(PROGRAM, 7, 0, 5_000_000), measured(PROGRAM, 7, 1, 5_000_500), measured(PROGRAM, 8, 0, 6_000_000)]
    tracks = written(tmp_path / "trace.json", steps)
    names = [stage.name for stage in PROGRAM.stages["colocated"]]
    assert len(tracks) == 4
    planned = [name for name in tracks if name.startswith("planned colocated 0")]
    assert planned == ["planned colocated 0, 8.3% idle"]
    assert [event["name"] for event in tracks[planned[0]] if event["tid"] == 1] == names
    assert [event["name"] for event in tracks[planned[0]] if event["tid"] == 2] == [
        "link.dispatch.1.0",
        "link.combine.1.0",
    ]
    first = tracks["measured shard 0"]
    assert [event["name"] for event in first] == names * 2
    assert [event["args"]["step"] for event in first] == [7] * len(names) + [8] * len(names)
    assert (first[0]["ts"], first[0]["dur"], first[len(names)]["ts"]) == (0.0, 1.0, 1000.0)
    assert tracks["measured shard 1"][0]["ts"] == 0.5


def test_a_shard_with_another_clock_is_drawn_from_the_same_step(tmp_path: Path) -> None:
    far = 10**15
    steps = [
        measured(PROGRAM, 7, 0, 5_000_000),
        measured(PROGRAM, 7, 1, far),
        measured(PROGRAM, 8, 0, 5_100_000),
        measured(PROGRAM, 8, 1, far + 100_200),
    ]
    tracks = written(tmp_path / "trace.json", steps)
    assert [event["ts"] for event in tracks["measured shard 1"] if event["name"] == "embed.0"] == [0.0, 100.2]


def test_a_file_without_measurements(tmp_path: Path) -> None:
    tracks = written(tmp_path / "trace.json", [TracedStep(1, 0, ())], shards=1)
    assert [name.split(",")[0] for name in tracks] == ["planned colocated 0"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_trace(tmp_path / "nowhere" / "trace.json", simulate(PROGRAM, COSTS), [])


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 10**12), st.integers(0, 10**6)),
        unique_by=lambda step: step[:2],
        max_size=8,
    )
)
def test_any_measurements_keep_their_durations_and_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int, int]]
) -> None:
    traced = [measured(PROGRAM, *step) for step in steps]
    tracks = written(tmp_path_factory.mktemp("trace") / "trace.json", traced, shards=1)
    for shard in {step.shard for step in traced}:
        own = sorted((time.begin, time.end) for step in traced if step.shard == shard for time in step.stages)
        events = sorted((event["ts"], event["dur"]) for event in tracks[f"measured shard {shard}"])
        for (one, two), (here, there) in zip(pairwise(own), pairwise(events), strict=True):
            assert there[0] - here[0] == pytest.approx((two[0] - one[0]) / 1000, abs=1e-3)
        durations = [event["dur"] for event in tracks[f"measured shard {shard}"]]
        assert sorted(durations) == sorted((end - begin) / 1000 for begin, end in own)
