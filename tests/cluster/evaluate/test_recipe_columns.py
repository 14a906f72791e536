"""Recipes as columns: what they are called, what they need, where it comes from, and that it is made once."""

import json
import os
from pathlib import Path

import pytest
from byte_model import write_byte_model
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.statistics import Statistics
from flyray.cluster.demo.files import DEMO_CALIBRATION, DEMO_MODEL, DEMO_TEXT
from flyray.cluster.evaluate import command as eval_command
from flyray.cluster.evaluate.quantized_cache import QuantizedCache
from flyray.cluster.evaluate.recipe_inputs import (
    Calibrating,
    CalibrationTextError,
    check_disjoint,
    make_inputs,
    moments_block,
)
from flyray.cluster.evaluate.selection import EvalError, select, wanted_of
from flyray.cluster.evaluate.settings import EvalSettings
from flyray.cluster.figures import read_figures
from flyray.cluster.quantize.matrix import QuantizeError
from flyray.cluster.quantize.plan_inputs import QuantizeInputs
from flyray.cluster.quantize.recipe import load_recipe
from flyray.cluster.sensitivity.sensitivity import Sensitivity

EXPERTS = 'modules: ["model.layers.*.mlp.experts.*"]'
CLIPPED = f"version: 1\nrules: [{{{EXPERTS}, format: w4a8-channel, clip: mse}}]\n"
CALIBRATED = f"version: 1\nrules: [{{{EXPERTS}, format: w4a8-channel, clip: energy, error_feedback: true}}]\n"
MIXED = f"""version: 1
rules:
  - {EXPERTS}
    mixed: {{low: {{format: w4a8-channel, clip: mse}}, high: {{format: w8a8}}, budget: 50%}}
"""
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 4, "Kimi zählt: 1, 2, 3, 4, 5, 6, 7.", "a b c " * 20]
OTHER_TEXTS = ["What was calibrated with is other text. " * 3, "It has two documents, and each is short. " * 3]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def write_texts(path: Path, texts: list[str]) -> Path:
    return Path(write(path, "\n".join(json.dumps({"text": text}) for text in texts)))


def calibrating(text: Path | None, evaluated: Path | None = None) -> Calibrating:
    return Calibrating(text, evaluated, EvalSettings(), Console(quiet=True))


def test_labels_are_names_of_formats_recipes_and_files(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", CLIPPED)
    labels = [wanted.label for wanted in wanted_of(["bf16", "w4a8", "w8a8-smooth", mine, "w4a8"], "w4a16")]
    assert labels == ["bf16", "w4a8", "w8a8-smooth", "mine"]
    every = [wanted.label for wanted in wanted_of(["all", mine], "w4a16")]
    assert every == ["bf16", "w4a16", "w4a8", "w8a8", "w8a8-fp8", "w4a8-channel", "mine"]
    with pytest.raises(EvalError, match=r"two recipes would both be called mine: .*/mine.yaml and .*/b/mine.yml"):
        wanted_of([mine, write(tmp_path / "b" / "mine.yml", CLIPPED)], "w4a16")
    with pytest.raises(EvalError, match=r"two recipes would both be called w8a8: w8a8 and"):
        wanted_of(["w8a8", write(tmp_path / "w8a8.yaml", CLIPPED)], "w4a16")
    with pytest.raises(EvalError, match="a recipe cannot be called bf16, which is a format"):
        wanted_of([write(tmp_path / "bf16.yaml", CLIPPED)], "w4a16")
    with pytest.raises(EvalError, match=r"unknown format 'mixt'; known are bf16, .*w8a8-smooth, a recipe's .yaml file"):
        wanted_of(["mixt"], "w4a16")
    with pytest.raises(QuantizeError, match=r"broken.yaml: 'rules' is missing"):
        wanted_of([write(tmp_path / "broken.yaml", "version: 1\n")], "w4a16")


def test_recipes_that_need_text_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", CLIPPED)
    for recipe, need in (("w8a8-smooth", "a calibration"), ("mixed", "a sensitivity file")):
        with pytest.raises(
            CalibrationTextError, match=rf"recipe {recipe} needs {need}: give text .*--calibration-text"
        ):
            select(DEMO_MODEL, [mine, recipe], tmp_path / "work", calibrating(None))
    with pytest.raises(CalibrationTextError, match=r"\d+ of its documents are also in"):
        select(DEMO_MODEL, ["w8a8-smooth"], tmp_path / "work", calibrating(DEMO_TEXT, DEMO_TEXT))
    assert not (tmp_path / "work").exists()


def test_packaged_texts_have_no_document_in_common(tmp_path: Path) -> None:
    check_disjoint(DEMO_CALIBRATION, DEMO_TEXT)
    some = write_texts(tmp_path / "some.jsonl", [*OTHER_TEXTS, TEXTS[1]])
    with pytest.raises(CalibrationTextError, match=r"some.jsonl: 1 of its documents are also in .*text.jsonl"):
        check_disjoint(some, write_texts(tmp_path / "text.jsonl", TEXTS))


@given(st.integers(1, 12), st.integers(1, 12))
def test_blocks_of_moments_divide_both_widths(hidden: int, inner: int) -> None:
    config = ModelConfig.from_dict(Checkpoint(DEMO_MODEL).config)
    assert moments_block(config) == 256
    widths = {"hidden_size": 64 * hidden, "moe_intermediate_size": 64 * inner}
    block = moments_block(type(config)(**{**vars(config), **widths}))
    assert 64 <= block <= 256
    assert all(width % block == 0 for width in widths.values())


def test_places_are_of_content_not_of_names(tmp_path: Path) -> None:
    cache = QuantizedCache(tmp_path / "work", DEMO_MODEL)
    one, same = (write(tmp_path / name / "mine.yaml", CLIPPED) for name in "ab")
    other = write(tmp_path / "c" / "mine.yaml", CLIPPED.replace("clip: mse", "clip: none"))
    statistics = tmp_path / "statistics"
    write(statistics / "statistics.json", "{}")
    places = [cache.place(load_recipe(file)) for file in (one, same, other)]
    assert places[0] == places[1] != places[2]
    calibrated = load_recipe(write(tmp_path / "calibrated.yaml", CALIBRATED))
    before = cache.place(calibrated, QuantizeInputs(statistics))
    write(statistics / "statistics.json", "{ }")
    assert cache.place(calibrated, QuantizeInputs(statistics)) != before


def test_recipes_beside_a_format_with_all_that_they_need(tmp_path: Path) -> None:
    write_byte_model(tmp_path / "model")
    recipes = {name: tmp_path / f"{name}.yaml" for name in ("clipped", "calibrated", "blend")}
    for (name, file), text in zip(recipes.items(), (CLIPPED, CALIBRATED, MIXED), strict=True):
        assert write(file, text).endswith(f"{name}.yaml")
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    arguments = {
        "text_file": write_texts(tmp_path / "text.jsonl", TEXTS),
        "tasks_file": write_texts(tmp_path / "tasks.jsonl", []),
        "calibration_file": write_texts(tmp_path / "calibration.jsonl", OTHER_TEXTS),
        "formats": ["w4a8", *map(str, recipes.values())],
        "settings": EvalSettings(window=100, tasks=0),
        "work_dir": tmp_path / "work",
        "json_path": tmp_path / "figures.json",
        "console": console,
    }
    assert eval_command.run([tmp_path / "model"], **arguments) == 0
    found = read_figures(tmp_path / "figures.json")
    for label in ("w4a8", *recipes):
        assert found[f"kl.{label}"].value > 0
        assert found[f"weight_error.{label}"].value > 0
    assert found["bytes.calibrated"].value == found["bytes.clipped"].value < found["bytes.blend"].value
    assert found["kl.blend"].value < found["kl.clipped"].value
    text = console.export_text()
    for words in (
        "calibrated needs a calibration: running calibration.jsonl through model, with second moments in blocks of 64",
        "blend needs to know what each group of experts loses at w4a8-channel: measured with calibration.jsonl",
    ):
        assert words in text
    [made] = (tmp_path / "work").glob("*/calibration-*")
    assert Statistics.open(made).tokens == sum(len(text.encode()) for text in OTHER_TEXTS)
    [file] = (tmp_path / "work").glob("*/sensitivity-*.json")
    assert Sensitivity.read(file).complete

    cache = QuantizedCache(tmp_path / "work", tmp_path / "model")
    again = calibrating(arguments["calibration_file"])
    inputs = make_inputs(cache, load_recipe(recipes["calibrated"]), again)  # would need Ray if it were not there
    assert inputs == QuantizeInputs(made)
    kept = cache.kept(load_recipe(recipes["calibrated"]), inputs)
    assert kept is not None
    assert kept.weight_error == found["weight_error.calibrated"].value
