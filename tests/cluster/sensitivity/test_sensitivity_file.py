"""The sensitivity file: written and read back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sensitivities import interval, loss, sensitivity, unit

from flyray.cluster.evaluate.intervals import Interval
from flyray.cluster.sensitivity.sensitivity import Check, Loss, Sensitivity, SensitivityError

FOUND = sensitivity([unit(1, [0, 2], 0.1), unit(1, [1, 3], -0.01), unit(2, [0, 1, 2, 3], 0.2)])


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_a_file_is_read_as_it_was_written(values: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("file") / "s.json"
    found = sensitivity([unit(layer, [0, 5], value) for layer, value in enumerate(values)])
    check = Check(share=0.5, bytes=100, predicted=values[0], loss=loss(values[-1]))
    found = found.model_copy(update={"checks": (check,)})
    found.write(file)
    assert Sensitivity.read(file) == found
    lines = file.read_text().splitlines()
    assert sum(line.startswith('  {"layer": ') for line in lines) == len(values)


def test_layers_and_experts() -> None:
    assert FOUND.layers == (1, 2)
    assert [each.experts for each in FOUND.layer_units(1)] == [(0, 2), (1, 3)]
    assert FOUND.experts == {(layer, expert) for layer in (1, 2) for expert in range(4)}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("version", 2, "'version': input should be 1"),
        ("tokens", 0, "'tokens'"),
        ("low", 4, "'low': input should be a valid string"),
        ("surprise", 1, "unknown field 'surprise'"),
        ("units", [{"layer": 1}], r"'units\[0\].experts' is missing"),
        ("grouping", "luck", "'grouping'"),
    ],
)
def test_fields_that_are_wrong(tmp_path: Path, field: str, value: object, words: str) -> None:
    file = tmp_path / "s.json"
    FOUND.write(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(SensitivityError, match=rf"s.json is not a sensitivity file: .*{words}"):
        Sensitivity.read(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SensitivityError, match=r"none.json cannot be read: No such file"):
        Sensitivity.read(tmp_path / "none.json")
    for name, content in (("a.json", b"\xff\xfe"), ("b.json", b"{"), ("c.json", b"[]"), ("d.json", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SensitivityError, match=f"{name} is not a sensitivity file"):
            Sensitivity.read(tmp_path / name)


def test_an_expert_is_in_one_unit_and_a_value_in_its_interval() -> None:
    text = sensitivity([unit(1, [0, 1], 0.1)]).model_dump_json()
    twice = json.loads(text)
    twice["units"] *= 2
    with pytest.raises(ValueError, match="expert 0 of layer 1 is in two units"):
        Sensitivity.model_validate_json(json.dumps(twice))
    with pytest.raises(ValueError, match="kl must lie between its low and its high"):
        Loss(kl=Interval(1.0, 2.0, 3.0), perplexity_ratio=interval(1.0), top1=interval(0.0))
