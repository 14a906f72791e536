"""`flyray bench quantize` runs both in turns, leaves nothing, and its figures belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flyray.cluster.bench.copying import seconds_to_copy
from flyray.cluster.cli import app
from flyray.cluster.synthesize import Synthesis, synthesize

SMALL = {"num_hidden_layers": 2, "n_routed_experts": 8, "hidden_size": 256, "moe_intermediate_size": 128}
SMALL |= {"intermediate_size": 192, "vocab_size": 512}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    synthesize(tmp_path / "source", Synthesis(changes=SMALL), progress=False)
    return tmp_path / "source"


def test_rates_are_of_the_same_bytes_and_nothing_stays(source: Path, tmp_path: Path) -> None:
    work, figures = tmp_path / "work", tmp_path / "figures.json"
    command = ["bench", "quantize", str(source), "--work-dir", str(work), "--runs", "1", "--workers", "1"]
    done = CliRunner().invoke(app, [*command, "--json", str(figures)])
    assert done.exit_code == 0, done.output
    assert done.output.count("run ") == 1
    found = {figure["name"]: figure["value"] for figure in json.loads(figures.read_text())["figures"]}
    assert found["share_of_copy.w4a8"] == pytest.approx(found["quantize_rate.w4a8"] / found["copy_rate"])
    assert found["peak_memory.quantize.w4a8"] > 0
    assert list(work.iterdir()) == []


def test_a_recipe_that_is_not_there_is_a_usage_error(source: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "quantize", str(source), "--recipe", "w5a8"])
    assert done.exit_code == 2
    assert "unknown recipe 'w5a8'" in done.output


def test_a_source_that_is_no_checkpoint_is_a_usage_error(tmp_path: Path) -> None:
    command = ["bench", "quantize", str(tmp_path / "nowhere"), "--work-dir", str(tmp_path / "work")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "nowhere: no such checkpoint folder" in done.output
    assert not (tmp_path / "work").exists()


def test_copying_takes_time_and_removes_the_copy(source: Path, tmp_path: Path) -> None:
    assert seconds_to_copy(source, tmp_path / "copy") > 0
    assert not (tmp_path / "copy").exists()
