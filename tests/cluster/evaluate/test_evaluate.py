"""Evaluation through real engines, against transformers in float32; and what is refused before anything starts."""

import json
from pathlib import Path

import pytest
from byte_model import log_probabilities, write_byte_model
from rich.console import Console

from flyray.cluster.demo.files import DEMO_MODEL
from flyray.cluster.evaluate import command as eval_command
from flyray.cluster.evaluate.columns import Column, ColumnScore, TaskScore, task_scores
from flyray.cluster.evaluate.command import EvalError, EvalSettings, check_labels, columns_of, read_material
from flyray.cluster.evaluate.kept_quality import KeptQuality, load_quality
from flyray.cluster.evaluate.perplexity import TextScore
from flyray.cluster.evaluate.score import Task
from flyray.cluster.evaluate.table import figures, quality_table
from flyray.cluster.figures import read_figures

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 4, "Kimi zählt: 1, 2, 3, 4, 5, 6, 7.", "a b c " * 20]
WINDOW = 100


def write_material(folder: Path) -> tuple[Path, Path]:
    text, tasks = folder / "text.jsonl", folder / "tasks.jsonl"
    text.write_text("\n".join(json.dumps({"text": each}) for each in TEXTS))
    message = {"role": "user", "content": "What is 1 + 1?"}
    contents = [{"family": "add", "split": split, "messages": [message], "answer": "2"} for split in ("new", "old")]
    tasks.write_text("\n".join(map(json.dumps, contents)))
    return text, tasks


def test_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    model = write_byte_model(tmp_path / "model")
    text_file, tasks_file = write_material(tmp_path)
    console = Console(width=80, record=True, quiet=False)
    code = eval_command.run(
        [tmp_path / "model"],
        text_file=text_file,
        tasks_file=tasks_file,
        formats=["bf16", "w4a8"],
        settings=EvalSettings(window=WINDOW, max_tokens=8, tasks=2),
        work_dir=tmp_path / "work",
        json_path=tmp_path / "figures.json",
        console=console,
    )
    assert code == 0
    found = read_figures(tmp_path / "figures.json")
    encoded = [list(text.encode()) for text in TEXTS]
    windows = [ids[begin : begin + WINDOW] for ids in encoded for begin in range(0, len(ids), WINDOW)]
    nats = [-value for window in windows for value in log_probabilities(model, window)]
    mean = sum(nats) / len(nats)
    score = found["perplexity.bf16"]
    assert abs(score.value / 2.718281828459045**mean - 1) < 1e-4
    assert found["eval.tokens"].value == found["eval.bytes"].value == len(nats)
    assert abs(found["perplexity_ratio.w4a8"].value - 1) < 0.05
    assert found["perplexity_ratio.bf16"].value == 1.0
    assert {"task_score.add.bf16", "task_score.heldout-new.w4a8", "task_score.all.w4a8"} <= set(found)
    assert [kept.name for kept in (tmp_path / "work").glob("*/*")] == ["w4a8"]
    assert "of bf16's" in console.export_text()


def test_formats_that_a_checkpoint_cannot_be_had_in(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="unknown format 'w3a8'; known are bf16, w4a16"):
        columns_of(DEMO_MODEL, ["w3a8"], tmp_path)
    columns, kept = columns_of(DEMO_MODEL, ["bf16", "w4a16", "bf16"], tmp_path)
    assert columns == [Column("bf16", DEMO_MODEL, "bf16"), Column("w4a16", DEMO_MODEL, "auto")]
    assert kept == {}
    with pytest.raises(EvalError, match="both be called x"):
        check_labels([Column("x:bf16", DEMO_MODEL, "bf16"), Column("x:bf16", tmp_path, "bf16")])


def test_material_must_be_enough(tmp_path: Path) -> None:
    text_file, tasks_file = write_material(tmp_path)
    with pytest.raises(EvalError, match="neither text nor a task"):
        read_material(text_file, tasks_file, EvalSettings(tasks=0, text_bytes=0))
    with pytest.raises(EvalError, match="holds one document"):
        read_material(text_file, tasks_file, EvalSettings(text_bytes=10))
    material = read_material(text_file, tasks_file, EvalSettings(tasks=1, text_bytes=0))
    assert (len(material.documents), len(material.tasks)) == (0, 1)


def task(family: str, split: str) -> Task:
    return Task(family, split, ({"role": "user", "content": "?"},), (), "!", True)


def test_scores_by_family_split_and_all() -> None:
    tasks = [task("add", "new"), task("add", "old"), task("copy", "new")]
    scores = task_scores(tasks, [True, False, True])
    assert scores == (
        TaskScore("add", 1, 2),
        TaskScore("copy", 1, 1),
        TaskScore("heldout-new", 2, 2),
        TaskScore("heldout-old", 0, 1),
        TaskScore("all", 2, 3),
    )
    assert [score.name for score in task_scores(tasks[::2], [True, True])] == ["add", "copy", "all"]
    assert task_scores([], []) == ()


def columns() -> list[ColumnScore]:
    text = TextScore((10.0, 21.0), (10, 20), (30, 60))
    other = TextScore((10.5, 22.0), (10, 20), (30, 60))
    tasks = (TaskScore("add", 9, 10), TaskScore("all", 9, 10))
    names = ["bf16", "w4a16", "w4a8", "w8a8", "w8a8-fp8", "w4a8-channel"]
    return [ColumnScore(name, text if name == "bf16" else other, tasks, 7) for name in names]


def test_table_fits_eighty_characters() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(quality_table(columns(), extra=[("MB on disk", ["30.9"] * 6)]))
    text = console.export_text()
    assert "…" not in text
    for words in ("w4a8-channel", "105.13%", "9/10", "60–98", "30 tokens (90 bytes) of 2 held-out documents"):
        assert words in text


def test_figures_of_columns() -> None:
    found = {figure.name: figure for figure in figures(columns())}
    assert found["perplexity.bf16"].value == pytest.approx(2.718281828459045 ** (31 / 30))
    assert found["perplexity_ratio.w8a8"].value == pytest.approx(2.718281828459045 ** (1.5 / 30))
    assert found["task_score.add.w8a8-fp8"].value == 0.9
    without_reference = {figure.name for figure in figures(columns()[1:])}
    assert not any(name.startswith("perplexity_ratio") for name in without_reference)


def test_kept_quality_is_the_same_and_only_for_its_key(tmp_path: Path) -> None:
    quality = KeptQuality("key", "2026-01-01 10:00", 12.5, (*columns(), ColumnScore("no text", None, (), 0)))
    quality.save(tmp_path / "quality.json")
    assert load_quality(tmp_path / "quality.json", "key") == quality
    assert load_quality(tmp_path / "quality.json", "other") is None
    assert load_quality(tmp_path / "none.json", "key") is None
    (tmp_path / "quality.json").write_text("{")
    assert load_quality(tmp_path / "quality.json", "key") is None
