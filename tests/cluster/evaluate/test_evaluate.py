"""Evaluation through real engines, against transformers in float32; and what is refused before anything starts."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from byte_model import log_probabilities, write_byte_model
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.demo.files import DEMO_MODEL
from flyray.cluster.evaluate import command as eval_command
from flyray.cluster.evaluate.columns import Column, ColumnScore, TaskScore, task_scores
from flyray.cluster.evaluate.command import read_material
from flyray.cluster.evaluate.kept_quality import KeptQuality, load_quality
from flyray.cluster.evaluate.perplexity import TextScore
from flyray.cluster.evaluate.recipe_inputs import Calibrating
from flyray.cluster.evaluate.score import Task
from flyray.cluster.evaluate.selection import EvalError, check_labels, select, tensor_bytes
from flyray.cluster.evaluate.settings import EvalSettings
from flyray.cluster.evaluate.table import figures, heading, quality_tables
from flyray.cluster.figures import read_figures

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 4, "Kimi zählt: 1, 2, 3, 4, 5, 6, 7.", "a b c " * 20]
WINDOW = 100
NO_TEXT = Calibrating(None, None, EvalSettings(), Console(quiet=True))


def write_material(folder: Path) -> tuple[Path, Path]:
    text, tasks = folder / "text.jsonl", folder / "tasks.jsonl"
    text.write_text("\n".join(json.dumps({"text": each}) for each in TEXTS))
    message = {"role": "user", "content": "What is 1 + 1?"}
    contents = [{"family": "add", "split": split, "messages": [message], "answer": "2"} for split in ("new", "old")]
    tasks.write_text("\n".join(map(json.dumps, contents)))
    return text, tasks


def test_perplexity_is_that_of_transformers_and_equal_weights_have_no_kl(tmp_path: Path) -> None:
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
    for label in ("bf16", "w4a16"):  # the reference was not asked for, and is measured all the same
        assert abs(found[f"perplexity.{label}"].value / math.e**mean - 1) < 1e-4
    assert found["eval.tokens"].value == found["eval.bytes"].value == len(nats)
    assert abs(found["perplexity_ratio.w4a8"].value - 1) < 0.05
    # Equal weights through an engine of their own: nothing differs, to the bit.
    assert [found[f"kl.bf16{part}"].value for part in ("", ".low", ".high")] == [0.0, 0.0, 0.0]
    assert found["top1.bf16"].value == found["perplexity_ratio.bf16"].value == 1.0
    assert 0 <= found["kl.w4a8.low"].value < found["kl.w4a8"].value < found["kl.w4a8.high"].value < 0.2
    assert 0.5 < found["top1.w4a8"].value < 1
    [made] = (tmp_path / "work").glob("*/w4a8*")
    for label, path in (("w4a16", tmp_path / "model"), ("w4a8", made)):
        assert found[f"bytes.{label}"].value == tensor_bytes(Checkpoint(path))
    assert "bytes.bf16" not in found
    assert {"task_score.add.bf16", "task_score.heldout-new.w4a8", "task_score.all.w4a8"} <= set(found)
    assert not list((tmp_path / "work").glob("distributions-*"))
    text = console.export_text()
    assert "of reference's" in text
    assert "0.4 MB in " in text


def test_formats_that_a_checkpoint_cannot_be_had_in(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="unknown format 'w3a8'; known are bf16, w4a16"):
        select(DEMO_MODEL, ["w3a8"], tmp_path, NO_TEXT)
    selection = select(DEMO_MODEL, ["bf16", "w4a16", "bf16"], tmp_path, NO_TEXT)
    size = tensor_bytes(Checkpoint(DEMO_MODEL))
    assert selection.columns == (
        Column("bf16", DEMO_MODEL, "bf16", "w4a16"),
        Column("w4a16", DEMO_MODEL, "auto", "w4a16", size),
    )
    assert selection.kept == {}
    with pytest.raises(EvalError, match="both be called x"):
        check_labels([Column("x:bf16", DEMO_MODEL, "bf16"), Column("x:bf16", tmp_path, "bf16")])


def test_the_reference_is_the_checkpoint_itself_and_comes_with_what_is_compared(tmp_path: Path) -> None:
    alone = select(DEMO_MODEL, ["w4a16"], tmp_path, NO_TEXT)
    assert [(column.label, column.reference) for column in alone.columns] == [("w4a16", "")]
    pair = select(DEMO_MODEL, ["bf16"], tmp_path, NO_TEXT, prefix="nano:")
    assert [(column.label, column.reference) for column in pair.columns] == [
        ("nano:w4a16", "nano:w4a16"),
        ("nano:bf16", "nano:w4a16"),
    ]
    plain = select(DEMO_MODEL, ["bf16"], tmp_path, NO_TEXT, compared=False)
    assert [(column.label, column.reference) for column in plain.columns] == [("bf16", "")]


def test_columns_are_measured_with_each_dtype_of_kv_pages(tmp_path: Path) -> None:
    reference, other = Column("w4a16", tmp_path, "auto", "w4a16"), Column("w4a8", tmp_path, "w4a8", "w4a16")
    found = [*reference.with_kv_dtypes(["int8"]), *other.with_kv_dtypes(["int8", "auto", "fp8", "int8"])]
    assert [(column.label, column.kv_dtype, column.is_reference) for column in found] == [
        ("w4a16", "auto", True),
        ("w4a16+int8", "int8", False),
        ("w4a8+int8", "int8", False),
        ("w4a8", "auto", False),
        ("w4a8+fp8", "fp8", False),
    ]
    assert {column.reference for column in found} == {"w4a16"}
    text_file, tasks_file = write_material(tmp_path)
    with pytest.raises(EvalError, match="kv_dtype: 'bf16', but the backend 'cpu' keeps"):
        eval_command.run([DEMO_MODEL], text_file=text_file, tasks_file=tasks_file, kv_dtypes=["bf16"])


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
    other = TextScore((10.5, 22.0), (10, 20), (30, 60), (0.01, 0.05), (9, 19))
    tasks = (TaskScore("add", 9, 10), TaskScore("all", 9, 10))
    names = ["w4a16", "bf16", "w4a8", "w8a8", "w8a8-fp8", "w4a8-channel"]
    return [ColumnScore(name, text if name == "w4a16" else other, tasks, 7, "w4a16", 30_900_000) for name in names]


def printed(scores: list[ColumnScore]) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in quality_tables(scores, {"w4a8": 0.0042}):
        console.print(table)
    return console.export_text()


def test_table_fits_eighty_characters() -> None:
    text = printed(columns())
    assert "…" not in text
    assert text.count("w4a8-channel") == 1
    for words in ("105.13%", "0.00200", "93.33%", "0.42%", "9/10", "60–98", "30 tokens (90 bytes) of 2 held-out"):
        assert words in text


def test_tables_of_many_columns_with_long_names() -> None:
    more = [replace(columns()[1], label=f"w4a8-channel-calibrated-{number}") for number in range(3)]
    text = printed([*columns(), *more])
    assert "…" not in text
    assert (text.count("KL, nats"), text.count("reference:")) == (2, 1)
    assert heading("w4a8-channel-calibrated") == "w4a8-\nchannel-\ncalibrated"
    assert heading("w4a8-channel") == "w4a8-channel"


@given(st.text(alphabet="ab-:", max_size=40))
def test_headings_keep_every_character(label: str) -> None:
    assert heading(label).replace("\n", "") == label


def test_figures_of_columns() -> None:
    found = {figure.name: figure for figure in figures(columns())}
    assert found["perplexity.w4a16"].value == pytest.approx(math.e ** (31 / 30))
    assert found["perplexity_ratio.w8a8"].value == pytest.approx(math.e ** (1.5 / 30))
    assert found["kl.w8a8"].value == pytest.approx(0.06 / 30)
    assert found["top1.w8a8"].value == pytest.approx(28 / 30)
    assert (found["kl.w4a16.high"].value, found["top1.w4a16.low"].value) == (0.0, 1.0)
    assert found["bytes.w4a8"].value == 30_900_000
    assert found["task_score.add.w8a8-fp8"].value == 0.9
    without_reference = {figure.name for figure in figures(columns()[1:])}
    assert not any(name.startswith(("perplexity_ratio", "kl", "top1")) for name in without_reference)


def test_kept_quality_is_the_same_and_only_for_its_key(tmp_path: Path) -> None:
    quality = KeptQuality("key", "2026-01-01 10:00", 12.5, (*columns(), ColumnScore("no text", None, (), 0)))
    quality.save(tmp_path / "quality.json")
    assert load_quality(tmp_path / "quality.json", "key") == quality
    assert load_quality(tmp_path / "quality.json", "other") is None
    assert load_quality(tmp_path / "none.json", "key") is None
    (tmp_path / "quality.json").write_text("{")
    assert load_quality(tmp_path / "quality.json", "key") is None
