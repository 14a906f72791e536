"""Losses measured through a real engine, against checkpoints that are quantized so; resuming; and what is refused."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import write_byte_model
from rich.console import Console

from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.evaluate.columns import Column, ColumnScore, Material, evaluate
from flyray.cluster.evaluate.perplexity import TextScore, choose, read_documents
from flyray.cluster.figures import read_figures, write_figures
from flyray.cluster.quantize.command import QuantizeInputs, quantize
from flyray.cluster.quantize.recipe import Recipe
from flyray.cluster.sensitivity.command import SensitivitySettings, measure_sensitivity
from flyray.cluster.sensitivity.measure import loss_against
from flyray.cluster.sensitivity.sensitivity import Sensitivity, SensitivityError
from flyray.cluster.sensitivity.table import figures, print_sensitivity
from flyray.cluster.sensitivity.units import plan_units, split

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "Kimi zählt: 1, 2, 3, 4, 5, 6, 7. " * 3, "a b c " * 16]
MATRICES = "model.layers.*.mlp.experts.*"
LOW: dict[str, Any] = {"format": "w4a8-channel", "clip": "mse"}
HIGH: dict[str, Any] = {"format": "w8a8"}


def recipe(name: str, *rules: dict[str, Any]) -> Recipe:
    return Recipe.model_validate_json(json.dumps({"name": name, "version": 1, "rules": rules}))


@dataclass(frozen=True)
class Measured:
    """The source, its two quantized forms, text, and what was measured of them."""

    source: Path
    text: Path
    folder: Path
    settings: SensitivitySettings
    found: Sensitivity

    @property
    def file(self) -> Path:
        return self.folder / "sensitivity.json"

    def again(self, target: Path, settings: SensitivitySettings | None = None, overwrite: bool = False) -> Sensitivity:
        return measure_sensitivity(
            self.source,
            target,
            self.text,
            settings or self.settings,
            work_dir=self.folder / "work",
            overwrite=overwrite,
        )

    def score(self, *paths: Path) -> list[TextScore]:
        """The text's scores of whole checkpoints, compared with the source."""
        documents = choose(read_documents(self.text), self.settings.text_bytes)
        material = Material(tuple(documents), (), self.settings.window, 1, 4)
        columns = [Column("source", self.source, "auto", "source")]
        columns += [Column(path.name, path, "auto", "source") for path in paths]
        shelves = self.folder / "shelves"
        template = self.settings.engine(self.source)
        scores: list[ColumnScore] = asyncio.run(evaluate(columns, material, template, folder=shelves, lanes=2))
        return [score.text for score in scores[1:] if score.text]


@pytest.fixture(scope="module")
def measured(local_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("sensitivity")
    write_byte_model(folder / "source")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"source": str(n), "text": each}) for n, each in enumerate(TEXTS)))
    for name, scheme in (("low", LOW), ("high", HIGH)):
        rule = {"modules": [MATRICES], **scheme}
        quantize(folder / "source", folder / name, recipe(name, rule), progress=False)
    settings = SensitivitySettings(
        low=str(folder / "low"), high=str(folder / "high"), groups=2, shares=(0.0, 0.5), window=100, concurrency=4
    )
    found = measure_sensitivity(
        folder / "source", folder / "sensitivity.json", text, settings, work_dir=folder / "work"
    )
    return Measured(folder / "source", text, folder, settings, found)


def test_losses_are_those_of_checkpoints_that_are_quantized_so(measured: Measured) -> None:
    unit, (all_low, half) = measured.found.units[-1], measured.found.checks
    experts = "|".join(map(str, unit.experts))
    of_unit = rf"re:model\.layers\.{unit.layer}\.mlp\.experts\.({experts})\..*"
    one_unit = recipe("one-unit", {"modules": [of_unit], **LOW}, {"modules": [MATRICES], **HIGH})
    mixed = recipe("mixed", {"modules": [MATRICES], "mixed": {"low": LOW, "high": HIGH}})
    by_file = QuantizeInputs(sensitivity=measured.file, budget="50%")
    for made, inputs in ((one_unit, None), (mixed, by_file)):
        quantize(measured.source, measured.folder / made.name, made, inputs, progress=False)
    paths = (measured.folder / name for name in ("one-unit", "mixed", "low", "high"))
    of_one, of_mixed, of_low, base = measured.score(*paths)
    assert unit.loss == loss_against(of_one, base)
    assert half.loss == loss_against(of_mixed, base)
    assert all_low.loss == loss_against(of_low, base)
    assert all_low.loss.kl.value > 0
    found = measured.found.base
    assert (found.kl, found.top1, found.perplexity) == (base.kl, base.top1, base.perplexity)


def test_units_cover_all_experts_and_their_bytes(measured: Measured) -> None:
    found = measured.found
    assert found.complete
    assert found == Sensitivity.read(measured.file)
    assert (found.low, found.high, found.grouping) == ("w4a8-channel", "w8a8", "number")
    for name in ("low", "high"):
        checkpoint = Checkpoint(measured.folder / name)
        size = sum(checkpoint.entry(tensor).bytes for tensor in checkpoint.names if ".mlp.experts." in tensor)
        assert sum(getattr(unit, f"bytes_{name}") for unit in found.units) == size
    assert [len(found.layer_units(layer)) for layer in found.layers] == [2] * len(found.layers)
    sizes = [len(text.encode()) for text in TEXTS]
    # The first token of a window is given.
    assert (found.tokens, found.documents) == (sum(size - -(-size // 100) for size in sizes), 3)
    assert [check.share for check in found.checks] == [0.0, 0.5]
    assert found.checks[0].bytes == sum(unit.bytes_low for unit in found.units)
    assert not list((measured.folder / "work").glob("distributions-*"))


def test_a_stopped_run_goes_on_and_a_finished_one_is_kept(measured: Measured, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    first = measured.found.units[0]
    marked = first.model_copy(update={"loss": first.loss.model_copy(update={"perplexity_ratio": first.loss.kl})})
    part = measured.found.model_copy(update={"units": (marked,), "checks": (), "complete": False})
    part.write(file)
    whole = measured.again(file)
    # The kept unit was not measured again, all others were, and give the same bits.
    assert whole.units == (marked, *measured.found.units[1:])
    assert whole == Sensitivity.read(file)
    assert whole.model_copy(update={"units": measured.found.units}) == measured.found
    assert measured.again(file) == whole


def test_the_file_of_another_run_is_not_touched(measured: Measured, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    measured.found.write(file)
    before = file.read_bytes()
    for other in (replace(measured.settings, groups=1), replace(measured.settings, window=50)):
        with pytest.raises(SensitivityError, match=r"s.json: was measured of another checkpoint, other formats"):
            measured.again(file, other)
    assert file.read_bytes() == before
    file.write_text("notes")
    with pytest.raises(SensitivityError, match=r"s.json is not a sensitivity file"):
        measured.again(file)
    one_layer = replace(measured.settings, groups=1, shares=())
    assert {len(unit.experts) for unit in measured.again(file, one_layer, overwrite=True).units} == {8}


def test_what_cannot_be_measured_is_refused(measured: Measured, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    cases = {
        r"low: 'w3a8' is neither a folder nor one of the formats w4a8, ": {"low": "w3a8"},
        "groups: 9 groups of the 8 experts of a layer": {"groups": 9},
        r"low: expert 0 of layer \d takes .* low must be the smaller": {
            "low": measured.settings.high,
            "high": measured.settings.low,
        },
    }
    for words, changes in cases.items():
        with pytest.raises(SensitivityError, match=words):
            measured.again(file, replace(measured.settings, **changes))
    for words, changes in {"groups: 0; at least 1": {"groups": 0}, "shares: 1.5 does not": {"shares": (1.5,)}}.items():
        with pytest.raises(SensitivityError, match=words):
            replace(measured.settings, **changes)
    short = tmp_path / "text.txt"
    short.write_text("one document")
    with pytest.raises(SensitivityError, match=r"text.txt holds 1 documents; two are needed"):
        replace(measured, text=short).again(file)
    assert not file.exists()


def test_experts_in_order_of_use(measured: Measured) -> None:
    class Used:
        """Counts of a calibration: expert 6 most, then 1, then the others by their numbers."""

        def counts(self, number: int) -> torch.Tensor:
            return torch.tensor([1, 8, 1, 1, 1, 1, 9, 1])

    low, high = Checkpoint(measured.settings.low), Checkpoint(measured.settings.high)
    units = plan_units(low, high, 3, Used())
    assert [unit.experts for unit in units[:3]] == [(0, 1, 6), (2, 3, 4), (5, 7)]
    assert [list(part) for part in split(range(7), 3)] == [[0, 1, 2], [3, 4], [5, 6]]


def test_table_and_figures(measured: Measured, tmp_path: Path) -> None:
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_sensitivity(measured.found, console)
    text = console.export_text()
    assert "…" not in text
    for words in ("w4a8-channel", "group 1", "50%", "predicted"):
        assert words in text
    write_figures(tmp_path / "f.json", figures(measured.found))
    found = read_figures(tmp_path / "f.json")
    unit = measured.found.units[0]
    assert found[f"sensitivity.kl.layer-{unit.layer}.group-0"].value == unit.loss.kl.value
    assert found["sensitivity.kl.mixed-50.high"].value == measured.found.checks[1].loss.kl.high
    assert found["sensitivity.predicted.mixed-0"].value == pytest.approx(measured.found.checks[0].predicted)
