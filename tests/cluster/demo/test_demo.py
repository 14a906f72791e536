"""The demo's parts that need no server: what is asked in its batch, what is served, what it reports."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from flyray.cluster.batch.line import RawLine, parse_line
from flyray.cluster.chat import _message as as_message
from flyray.cluster.chat_template import render
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.demo import demo
from flyray.cluster.demo.files import DEMO_TASKS, DEMO_TEXT
from flyray.cluster.demo.quality import SETTINGS, DemoQuality
from flyray.cluster.evaluate.columns import ColumnScore, TaskScore
from flyray.cluster.evaluate.kept_quality import KeptQuality
from flyray.cluster.evaluate.perplexity import TextScore, choose, read_documents
from flyray.cluster.evaluate.quantized_cache import KeptCheckpoint
from flyray.cluster.evaluate.score import read_tasks
from flyray.cluster.figures import check_figures
from flyray.cluster.front.requests import ChatRequest, parse
from flyray.cluster.quantize.matrix import TARGET_FORMATS


def quality() -> DemoQuality:
    text = TextScore((10.0, 21.0), (10, 20), (30, 60))
    tasks = (TaskScore("add", 9, 10), TaskScore("all", 9, 10))
    other = TextScore((10.5, 22.0), (10, 20), (30, 60), (0.01, 0.05), (9, 19))
    scores = tuple(
        ColumnScore(label, text if label == "w4a16" else other, tasks, 7, "w4a16", 30_900_000 if label != "bf16" else 0)
        for label in ("bf16", "w4a16", *TARGET_FORMATS)
    )
    kept = {format: KeptCheckpoint(format, Path("/kept") / format, 30_000_000, 0.01, 1.5) for format in TARGET_FORMATS}
    return DemoQuality(kept, KeptQuality("key", "2026-01-01 10:00", 60.0, scores), fresh=False)


def test_served_is_the_quantized_checkpoint_under_the_models_name() -> None:
    config = demo.served_config(quality(), 8123)
    assert (config.model.path, config.model.precision) == ("/kept/w4a8", "auto")
    assert config.model_name == DEMO_MODEL.name
    assert (config.serve.port, config.engine.shards) == (8123, 2)


def test_figures_are_those_asked_for() -> None:
    names = {figure.name for figure in check_figures(quality().figures())}
    for format in TARGET_FORMATS:
        assert {
            f"weight_error.{format}",
            f"bytes.{format}",
            f"perplexity.{format}",
            f"kl.{format}",
            f"top1.{format}",
            f"task_score.add.{format}",
        } <= names
        assert f"perplexity_ratio.{format}" in names
    assert {"perplexity.bf16", "perplexity.w4a16", "bytes.w4a16", "seconds.evaluate"} <= names


def test_table_has_sizes_errors_and_distances_in_eighty_characters() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    quality().print(console)
    text = console.export_text()
    assert "…" not in text
    for words in ("30.9", "1.00%", "0.00200", "93.33%", "Measured on 2026-01-01 10:00"):
        assert words in text


def write_tasks(path: Path, families: int, each: int) -> None:
    message = {"role": "user", "content": "What is 1 + 1?"}
    tasks = [
        {"family": f"family{family}", "split": "operands", "messages": [message], "tools": [], "answer": "2"}
        for family in range(families)
        for _ in range(each)
    ]
    path.write_text("\n".join(map(json.dumps, tasks)))


def test_batch_has_its_lines_from_all_families_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path / "tasks.jsonl", families=5, each=40)
    monkeypatch.setattr(demo, "DEMO_TASKS", tmp_path / "tasks.jsonl")
    tasks = demo.batch_tasks()
    assert len(tasks) == demo.BATCH_LINES == 32
    assert [task.family for task in tasks.values()] == [f"family{number % 5}" for number in range(32)]
    for name, task in tasks.items():
        data = json.dumps(demo.batch_line(name, task)).encode()
        line = parse_line(RawLine(1, data, len(data)))
        assert (line.custom_id, parse(line.body, ChatRequest).model) == (name, DEMO_MODEL.name)


def test_batch_with_few_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path / "tasks.jsonl", families=2, each=3)
    monkeypatch.setattr(demo, "DEMO_TASKS", tmp_path / "tasks.jsonl")
    assert len(demo.batch_tasks()) == len(list(read_tasks(tmp_path / "tasks.jsonl"))) == 6


def test_packaged_tasks_are_asked_as_the_model_learned_them() -> None:
    prompts = [json.loads(line)["prompt"] for line in DEMO_TASKS.read_text().splitlines()]
    tasks = list(read_tasks(DEMO_TASKS))
    assert len(tasks) == len(prompts) > 500
    for task, prompt in zip(tasks, prompts, strict=True):
        request = parse(task.request("m", 100), ChatRequest)
        messages = [as_message(message) for message in request.messages]
        assert render(messages, request.offered_tools, request.thinks) == prompt


def test_packaged_text_has_many_sources() -> None:
    documents = choose(read_documents(DEMO_TEXT), SETTINGS.text_bytes)
    assert len({document.source for document in documents}) >= 10
    assert sum(len(document.text.encode()) for document in documents) > 0.99 * SETTINGS.text_bytes
