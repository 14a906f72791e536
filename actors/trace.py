"""Timelines as a file that Perfetto and chrome://tracing open: the planned step beside the measured ones.

The format is Chrome's trace events as JSON: one process for each actor's plan and one for each shard's measurements,
"X" events with begin and duration in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .request import TracedStep
from .simulate import Timeline

Event = dict[str, Any]

PLANNED_THREADS = {"compute": 1, "link": 2}


def write_trace(path: str | Path, planned: Timeline, measured: Sequence[TracedStep]) -> None:
    """Writes both timelines, each from 0, into one JSON file. Raises OSError if it cannot be written."""
    document = {"displayTimeUnit": "ms", "traceEvents": trace_events(planned, measured)}
    Path(path).write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")


def trace_events(planned: Timeline, measured: Sequence[TracedStep]) -> list[Event]:
    """The events of the file: names of processes and threads first, then the stages by begin."""
    names, events = _planned(planned)
    more_names, more_events = _measured(measured, first_process=len({name["pid"] for name in names}) + 1)
    return [*names, *more_names, *sorted([*events, *more_events], key=lambda event: (event["ts"], event["pid"]))]


def _planned(timeline: Timeline) -> tuple[list[Event], list[Event]]:
    actors = sorted({(interval.role, interval.shard) for interval in timeline.intervals})
    processes = {actor: number for number, actor in enumerate(actors, 1)}
    names: list[Event] = []
    for (role, shard), process in processes.items():
        share = timeline.bubble_share(role, shard)
        names.append(_name("process_name", process, 0, f"planned {role} {shard}, {share:.1%} idle"))
        names.extend(_name("thread_name", process, thread, name) for name, thread in PLANNED_THREADS.items())
    events = [
        _interval(
            interval.name,
            processes[interval.role, interval.shard],
            PLANNED_THREADS[interval.resource],
            interval.begin,
            interval.end - interval.begin,
            {"program": timeline.program},
        )
        for interval in timeline.intervals
    ]
    return names, events


def _measured(steps: Sequence[TracedStep], first_process: int) -> tuple[list[Event], list[Event]]:
    steps = [step for step in steps if step.stages]
    shards = sorted({step.shard for step in steps})
    names, events = [], []
    origins = _origins(steps)
    for process, shard in enumerate(shards, first_process):
        names.append(_name("process_name", process, 0, f"measured shard {shard}"))
        names.append(_name("thread_name", process, 1, "stages"))
        for step in steps:
            if step.shard == shard:
                events.extend(
                    _interval(
                        stage.name,
                        process,
                        1,
                        (stage.begin - origins[shard]) / 1000,
                        (stage.end - stage.begin) / 1000,
                        {"step": step.step},
                    )
                    for stage in step.stages
                )
    return names, events


def _origins(steps: Iterable[TracedStep]) -> dict[int, int]:
    """For each shard the value of its clock, in nanoseconds, that is drawn as 0.

    Shards of one node share a clock. One whose first step does not overlap the same step of the lowest shard is on a
    node with another clock, for the shards of a step exchange tokens: that step is then drawn as beginning together.
    """
    spans: dict[int, dict[int, tuple[int, int]]] = {}
    for step in steps:
        begin, end = min(stage.begin for stage in step.stages), max(stage.end for stage in step.stages)
        spans.setdefault(step.shard, {})[step.step] = (begin, end)
    if not spans:
        return {}
    reference = spans[min(spans)]
    shifts: dict[int, int] = {}
    for shard, own in spans.items():
        common = sorted(own.keys() & reference.keys())
        shifts[shard] = 0
        if common:
            (begin, end), (other_begin, other_end) = own[common[0]], reference[common[0]]
            if begin > other_end or end < other_begin:
                shifts[shard] = begin - other_begin
    zero = min(begin - shifts[shard] for shard, own in spans.items() for begin, _ in own.values())
    return {shard: zero + shift for shard, shift in shifts.items()}


def _name(kind: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _interval(name: str, process: int, thread: int, begin: float, duration: float, args: dict[str, Any]) -> Event:
    return {
        "ph": "X",
        "name": name,
        "cat": name.partition(".")[0],
        "pid": process,
        "tid": thread,
        "ts": begin,
        "dur": duration,
        "args": args,
    }
