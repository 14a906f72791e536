"""Calibrating through a real engine; how text is cut; what the report says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from byte_model import CONTEXT, write_byte_model
from calibration_text import TEXTS, write_text
from gathered import write_statistics
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.statistics import Statistics, StatisticsError, StatisticsPlan
from flyray.cluster.calibrate.command import CalibrationSettings, calibrate
from flyray.cluster.calibrate.material import cut, read_windows
from flyray.cluster.calibrate.report import CalibrationReport, figures, show
from flyray.cluster.evaluate.perplexity import Document, TextError


class Bytes:
    """A token a byte."""

    def encode(self, text: str, allow_special: bool) -> list[int]:
        assert not allow_special
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("byte") / "model"
    write_byte_model(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def test_all_of_the_text_is_run_once(local_cluster: None, model: Path, text: Path, tmp_path: Path) -> None:
    ran: list[int] = []
    announced: list[int] = []
    settings = CalibrationSettings(text, window=100, moments_block=32, precision="w4a8", shards=2)
    report = calibrate(model, tmp_path / "out", settings, on_start=announced.append, on_tokens=ran.append)
    total = sum(len(text.encode()) for text in TEXTS)
    assert report.tokens == total == sum(ran)
    assert announced == [total]
    found = Statistics.open(tmp_path / "out")
    found.check(Checkpoint(model))
    assert (found.tokens, found.precision, found.plan.moments_block) == (total, "w4a8", 32)
    assert report.seconds > 0
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert [load.layer for load in report.loads] == [1, 2]
    # A window that is as long as the context leaves no place for the token that is sampled.
    whole = replace(settings, window=10 * CONTEXT, tokens=CONTEXT + 7, moments_block=0, shards=1)
    assert calibrate(model, tmp_path / "long", whole).tokens == CONTEXT + 7


def test_what_is_stopped_stays_incomplete_and_begins_anew(
    local_cluster: None, model: Path, text: Path, tmp_path: Path
) -> None:
    class Enough(Exception):
        pass

    def stop(tokens: int) -> None:
        raise Enough

    settings = CalibrationSettings(text, tokens=400)
    with pytest.raises(Enough):
        calibrate(model, tmp_path / "out", settings, on_tokens=stop)
    with pytest.raises(StatisticsError, match="incomplete"):
        Statistics.open(tmp_path / "out")
    assert calibrate(model, tmp_path / "out", settings).tokens == 400
    with pytest.raises(StatisticsError, match="complete statistics are there; name another folder, or remove it"):
        calibrate(model, tmp_path / "out", settings)


def report_of(folder: Path, counts: list[list[int]]) -> CalibrationReport:
    """A report whose experts had these tokens, layer by layer."""
    tokens = sum(counts[0]) // 2
    plan = StatisticsPlan("f", "bf16", tuple(range(1, 1 + len(counts))), (range(len(counts[0])),), 2, 8, 8, 0)
    write_statistics(folder, plan, tokens)
    statistics = Statistics.open(folder)
    statistics._counts.update({layer: torch.tensor(each) for layer, each in zip(plan.layers, counts, strict=True)})
    return CalibrationReport(statistics, 2.0, 1000)


def test_experts_never_reached_and_uneven_loads_are_told(tmp_path: Path) -> None:
    report = report_of(tmp_path / "out", [[4, 0, 0, 0, 12, 0], [3, 3, 2, 3, 2, 3]])
    assert report.unreached == tuple(f"model.layers.1.mlp.experts.{expert}" for expert in (1, 2, 3, 5))
    found = {figure.name: figure.value for figure in figures(report)}
    assert found["experts.unreached"] == 4
    assert found["expert_load.max"] == pytest.approx(4.5)
    assert found["expert_load.min"] == 0
    assert (found["calibrate.tokens"], found["calibrate.rate"]) == (8, 4)
    console = Console(width=90, record=True, quiet=False, file=(tmp_path / "printed").open("w"))
    show(report, console)
    printed = console.export_text()
    assert "model.layers.1.mlp.experts: 1-3,5" in printed
    assert "model.layers.2" not in printed
    even = report_of(tmp_path / "even", [[1, 1], [1, 1]])
    show(even, console)
    assert "every expert was reached" in console.export_text()


@given(
    texts=st.lists(st.tuples(st.sampled_from("abc"), st.text(max_size=30)), max_size=8),
    length=st.integers(1, 12),
    tokens=st.integers(0, 60),
)
def test_windows_take_sources_in_turns_up_to_the_limit(texts: list[tuple[str, str]], length: int, tokens: int) -> None:
    documents = [Document(source, text) for source, text in texts]
    windows = list(cut(Bytes(), documents, length, tokens))
    total = sum(len(text.encode()) for _, text in texts)
    assert sum(map(len, windows)) == (min(tokens, total) if tokens else total)
    assert all(0 < len(window) <= length for window in windows)
    whole = sorted(
        bytes(part)
        for _, text in texts
        for part in (text.encode()[begin : begin + length] for begin in range(0, len(text.encode()), length))
    )
    if not tokens or tokens >= total:
        assert sorted(map(bytes, windows)) == whole
    firsts = {source: text for source, text in reversed(texts) if text}
    if not tokens:
        assert {bytes(window) for window in windows[: len(firsts)]} == {
            text.encode()[:length] for text in firsts.values()
        }


def _no_text(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize(
    ("write", "named"),
    [(_no_text, "holds no text to calibrate with"), (lambda path: path.mkdir(), "cannot be read: Is a directory")],
)
def test_text_that_is_none_is_refused_before_an_engine_starts(
    model: Path, tmp_path: Path, write: Callable[[Path], None], named: str
) -> None:
    path = tmp_path / "text.txt"
    write(path)
    with pytest.raises(TextError, match=named):
        read_windows(path, Bytes(), 10, 0)
    with pytest.raises(TextError, match=named):
        calibrate(model, tmp_path / "out", CalibrationSettings(path))
    assert not (tmp_path / "out").exists()
