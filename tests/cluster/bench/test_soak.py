"""Some seconds of soak on a small model, and what a soak says of a difference."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tiny_checkpoint import write_tiny
from tiny_engine import greedy

from flyray.cluster.bench.soak import Answer, SoakError, SoakSettings, compare, soak


def test_answers_under_load_are_those_of_requests_run_alone(local_cluster: None, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model")
    said: list[str] = []
    report = soak(
        path,
        SoakSettings(1.0, answers=200, precision="w4a8", int8_weights=("head",), int4_weights=("shared",)),
        said.append,
        lambda main: asyncio.run(main()),
    )
    assert said == [f"{report.pool} requests have run alone"]
    assert min(report.equal, report.cancelled, report.preemptions, report.cached_tokens) > 0
    assert f"{report.equal} answers of {report.pool} requests" in report.lines()[0]
    assert {figure.name: figure.value for figure in report.figures()}["soak.equal"] == report.equal


EXPECTED = Answer((5, 6, 7), (-0.5, -0.25, -1.0), "length")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (Answer((5, 8, 7), (-0.5, -0.25, -1.0), "length"), r"token 1 .* are \(8, -0.25\), alone \(6, -0.25\)"),
        (Answer((5, 6, 7), (-0.5, -0.25, -1.5), "length"), r"token 2 .* are \(7, -1.5\), alone \(7, -1.0\)"),
        (Answer((5, 6), (-0.5, -0.25), "length"), r"token 2 .* are \(\), alone \(7, -1.0\)"),
        (Answer((5, 6, 7, 7), (-0.5, -0.25, -1.0, -1.0), "length"), r"token 3 .* are \(7, -1.0\), alone \(\)"),
        (Answer((5, 6, 7), (-0.5, -0.25, -1.0), "stop"), "ended by 'stop', alone by 'length'"),
        (Answer((4,), (-0.5,)), r"token 0 .* are \(4, -0.5\), alone \(5, -0.5\)"),
        (
            Answer((5,), (-0.5,), "", (((5, -0.5),),)),
            r"token 0 .* are \(5, -0.5, \(\(5, -0.5\),\)\), alone \(5, -0.5\)",
        ),
        (Answer((5,), (-0.5,), "", (), (-2.0,)), "the prompt's log probabilities are not those"),
    ],
)
def test_a_difference_is_told(found: Answer, says: str) -> None:
    with pytest.raises(SoakError, match=rf"request it \(prompt \[.*\], max_tokens 12, .*\): {says}"):
        compare(greedy("it", 4), EXPECTED, found)


@pytest.mark.parametrize("found", [EXPECTED, Answer((5, 6), (-0.5, -0.25)), Answer()])
def test_what_is_equal_or_was_left_passes(found: Answer) -> None:
    compare(greedy("it", 4), EXPECTED, found)
