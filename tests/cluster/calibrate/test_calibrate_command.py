"""`flyray calibrate` as a command, in a Ray of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_model import write_byte_model
from calibration_text import write_text
from rich.console import Console
from typer.testing import CliRunner

from flyray.cluster.calibrate import command
from flyray.cluster.calibrate.command import CalibrationSettings
from flyray.cluster.cli import app
from flyray.cluster.figures import read_figures


def test_it_prints_and_writes_what_it_found(tmp_path: Path) -> None:
    write_byte_model(tmp_path / "model")
    console = Console(width=100, record=True, quiet=False, file=(tmp_path / "printed").open("w"))
    settings, json_path = (
        CalibrationSettings(write_text(tmp_path / "text.jsonl"), tokens=300),
        tmp_path / "figures.json",
    )
    code = command.run(tmp_path / "model", tmp_path / "out", settings, json_path=json_path, console=console)
    assert code == 0
    found = read_figures(json_path)
    assert found["calibrate.tokens"].value == 300
    assert found["experts.total"].value == 16
    assert "300 tokens to 3 of 8 experts each" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["calibrate", "out"], "give a checkpoint (or --demo) and the folder to write"),
        (["calibrate", "--demo", "model", "out"], "give a checkpoint (or --demo) and the folder to write"),
        (["calibrate", "model", "out"], "give --text"),
        (["calibrate", "--demo", "out", "--moments-block", "7"], "moments_block: 7 does not divide hidden_size 256"),
        (["calibrate", "--demo", "out", "--shards", "99"], "shards: 99 shards cannot share 24 experts"),
    ],
)
def test_wrong_uses_are_explained(arguments: list[str], says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())
