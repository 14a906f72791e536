"""The page of what quantizing lost: what is on it, that it needs nothing else, and files that are refused."""

from __future__ import annotations

import builtins
import html.parser
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from sensitivities import HIGH, LOW, interval, loss, sensitivity, unit
from typer.testing import CliRunner

from flyray.cluster.cli import app
from flyray.cluster.figures import Figure, write_figures
from flyray.cluster.quality_report.advice import advice
from flyray.cluster.quality_report.command import render
from flyray.cluster.quality_report.inputs import (
    EvalColumn,
    Evaluation,
    Inputs,
    Quantized,
    ReportError,
    read_evaluation,
    read_inputs,
)
from flyray.cluster.quantize.manifest import FileRecord, Manifest, MatrixError, Origin
from flyray.cluster.sensitivity.sensitivity import Check, Sensitivity

VOID = {"meta", "br", "img", "link", "hr", "input", "use", "path", "rect"}
WORST = "model.layers.2.mlp.experts.1.down_proj"
PLOTS = {
    "bytes-kl": "Bytes on disk against KL",
    "bytes-perplexity-ratio": "Bytes on disk against perplexity",
    "tasks": "Share of tasks",
    "layers": "Loss by layer",
    "budget": "Loss against the byte budget",
    "errors": "Histograms of the matrices",
}


class Page(html.parser.HTMLParser):
    """Elements, ids and text; an element that is not closed where it must be is an AssertionError."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name in ("src", "href", "xlink:href") if (value := values.get(name))]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def column(label: str, size: int, kl: float, half: float = 0.0005) -> EvalColumn:
    ratio = interval(1 + kl, half)
    tasks = {"all": 0.9 - kl, "adding": 0.8}
    reference = kl == 0
    return EvalColumn(
        label, interval(9.0), ratio, interval(kl, 0 if reference else half), interval(1 - kl), size, tasks
    )


def evaluation() -> Evaluation:
    columns = (
        column("w4a16", 17_000_000, 0.0),
        column("w4a8", 16_000_000, 0.002),
        column("w8a8", 31_000_000, 0.0019),
        column("w4a8-channel", 15_900_000, 0.03),
        column("mixed", 23_000_000, 0.01),
    )
    return Evaluation(columns, 1234, 56, 200)


def measured() -> Sensitivity:
    units = [unit(1, [0, 1], 0.01), unit(1, [2, 3], 0.002), unit(2, [0, 1], 0.0005), unit(2, [2, 3], -0.0001)]
    units += [unit(3, [0, 1], 0.002), unit(3, [2, 3], 0.001)]
    checks = (
        Check(share=0.0, bytes=12 * LOW, predicted=0.0155, loss=loss(0.0150)),
        Check(share=0.5, bytes=12 * LOW + 6 * (HIGH - LOW), predicted=0.0015, loss=loss(0.004)),
    )
    return sensitivity(units).model_copy(update={"checks": checks})


def quantized(label: str = "channel<1>") -> Quantized:
    def matrix(layer: int, expert: int, kind: str) -> MatrixError:
        name = f"model.layers.{layer}.mlp.experts.{expert}.{kind}"
        error = 0.45 if name == WORST else 0.15 + 0.001 * expert
        return MatrixError(name, kind, "w4a8-channel", error**2 * 10, 10.0)

    kinds = ("gate_proj", "up_proj", "down_proj")
    matrices = tuple(matrix(layer, expert, kind) for layer in (1, 2) for expert in range(4) for kind in kinds)
    return Quantized(label, matrices, tuple(f"model.layers.1.mlp.experts.3.{kind}" for kind in kinds))


def test_the_page_has_every_plot_and_names_the_worst_tensor() -> None:
    text = render(Inputs(evaluation(), measured(), (quantized(),)))
    page = Page(text)
    assert page.tags.count("svg") == len(PLOTS)
    assert {"script", "iframe", "img", "link"}.isdisjoint(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    for name, words in PLOTS.items():
        assert f'aria-label="{words}' in text
        assert any(each.startswith(f"{name}-") for each in page.ids)
    rows = page.text.partition("The worst tensors")[2]
    assert rows.partition("model.layers")[2].startswith(WORST.removeprefix("model.layers"))
    assert "45.000 %" in rows
    assert "channel<1>: experts that calibration never reached model.layers.1.mlp.experts.3 " in page.text
    assert "<1>" not in text


def test_plots_take_the_pages_colours_and_are_well_formed() -> None:
    text = render(Inputs(evaluation(), measured(), (quantized(),)))
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
        # Greys that matplotlib draws by default would not be seen in one of the two schemes.
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
        assert "var(--ink)" in svg
    assert "prefers-color-scheme: dark" in text
    assert text == render(Inputs(evaluation(), measured(), (quantized(),)))


@pytest.mark.parametrize(
    ("inputs", "plots"),
    [
        (Inputs(evaluation(), None, ()), {"bytes-kl", "bytes-perplexity-ratio", "tasks"}),
        (Inputs(None, measured(), ()), {"layers", "budget"}),
        (Inputs(None, None, (quantized(), quantized("other"))), {"errors"}),
        (Inputs(Evaluation((column("w4a8", 1, 0.1),), 0, 0, 0), None, ()), set()),
    ],
)
def test_any_part_makes_a_page(inputs: Inputs, plots: set[str]) -> None:
    page = Page(render(inputs))
    assert page.tags.count("svg") == len(plots)
    for name in plots:
        assert any(each.startswith(f"{name}-") for each in page.ids)


def whats(inputs: Inputs) -> list[str]:
    return [each.what for each in advice(inputs)]


def test_advice_about_formats_follows_the_intervals() -> None:
    found = whats(Inputs(evaluation(), None, ()))
    assert "Prefer w4a8 to mixed." in found  # smaller, and less is lost; w8a8 is larger, the reference no choice
    assert "Do not choose between w8a8 and w4a8 by their loss." in found
    assert "Expect a measurable loss in perplexity from some formats." in found
    assert "Do not rank the formats by these task scores." in found
    far = Evaluation((column("a", 10, 0.01), column("b", 5, 0.5)), 1234, 56, 2000)
    assert "b does tasks measurably worse than a." in whats(Inputs(far, None, ()))
    close = advice(Inputs(Evaluation((column("a", 10, 0.0001), column("b", 5, 0.0002)), 1234, 56, 0), None, ()))
    same = {each.what: each.why for each in close}
    why = same["On this text the perplexity of a and b cannot be told from the reference's."]
    assert why.endswith("The smallest of them is b, 0.0 MB.")


def test_advice_about_layers_follows_the_losses() -> None:
    found = advice(Inputs(None, measured(), ()))
    by_what = {each.what: each.why for each in found}
    assert "65% of the summed loss in 17% of the experts" in by_what["Keep layer 1 (1 of its groups) at w8a8 first."]
    assert "1 (4.0 times)" in by_what["Mind layer 1: more than twice the median layer's loss."]
    assert "3 of 6 units can go to w4a8-channel without a loss that this text shows." in by_what
    assert "Losses do not quite add up: 50% of the way, choices lose more than predicted." in by_what
    good = measured().model_copy(update={"checks": measured().checks[:1]})
    assert "Trust the predicted losses." in whats(Inputs(None, good, ()))
    nothing = sensitivity([unit(1, [0], -0.1)])
    assert whats(Inputs(None, nothing, ())) == ["Put all experts at w4a8-channel."]


def test_advice_about_matrices_names_the_outlier() -> None:
    found = advice(Inputs(None, None, (quantized("q"),)))
    assert [each.what for each in found] == [
        "q: clip 1 of 24 matrices (clip: mse) or give them 8 bits.",
        "q: calibrate with more, or more varied, text.",
    ]
    assert f"{WORST} (3.0 times)" in found[0].why


def some_figures() -> list[Figure]:
    found = []
    for label, value in (("w4a8", 9.0), ("x.w4a8", 10.0)):
        for kind in ("perplexity", "kl"):
            found += [Figure(f"{kind}.{label}{end}", value, "1") for end in ("", ".low", ".high")]
        found.append(Figure(f"task_score.all.{label}", value / 10, "1"))
        found.append(Figure(f"task_score.add.two.{label}", 0.5, "1"))
        found.append(Figure(f"bytes.{label}", 100, "bytes"))
    return [*found, Figure("eval.tokens", 12, "tokens"), Figure("eval.tasks", 10, "tasks")]


def test_figures_of_an_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    write_figures(file, some_figures())
    found = read_evaluation(file)
    assert [each.label for each in found.columns] == ["w4a8", "x.w4a8"]
    first, second = found.columns
    assert (first.bytes, first.perplexity_ratio) == (100, None)
    assert first.kl is not None
    assert (first.kl.value, first.kl.low) == (9.0, 9.0)
    assert first.tasks == {"all": 0.9, "add.two": 0.5}
    assert second.tasks == {"all": 1.0, "add.two": 0.5}
    assert (found.tokens, found.documents, found.tasks, found.families) == (12, 0, 10, ("add.two",))
    share = found.task_share(first)
    assert share is not None
    assert share.value == 0.9
    assert Page(render(Inputs(found, None, ()))).tags.count("svg") == 2


def test_files_that_are_no_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    for content in ("{", "[]", '{"figures": 1}', '{"figures": [{"name": "a"}]}', '{"figures": ["a"]}'):
        file.write_text(content)
        with pytest.raises(ReportError, match=r"eval.json holds no figures; give what 'flyray eval --json FILE'"):
            read_evaluation(file)
    write_figures(file, [Figure("bytes.w4a8", 1, "bytes")])
    with pytest.raises(ReportError, match=r"eval.json: has no figure perplexity.LABEL"):
        read_evaluation(file)
    write_figures(file, [Figure("perplexity.w4a8", 1, "1"), Figure("perplexity.w4a8.low", 1, "1")])
    with pytest.raises(ReportError, match=r"has perplexity.w4a8, but not perplexity.w4a8.high"):
        read_evaluation(file)
    file.write_text(json.dumps({"figures": [{"name": "perplexity.w4a8", "value": "9", "unit": "1"}]}))
    with pytest.raises(ReportError, match=r"perplexity.w4a8 is '9', must be a number"):
        read_evaluation(file)
    with pytest.raises(ReportError, match=r"none.json cannot be read: No such file"):
        read_evaluation(tmp_path / "none.json")


def write_manifest(folder: Path) -> Path:
    found = quantized()
    record = FileRecord(1, "0" * 64, 1, 0.1, 1, 1, "node", found.matrices, found.uncalibrated)
    folder.mkdir(parents=True)
    origin = Origin("source", {"name": "mixed"}, {}, "code")
    (folder / "quantize.json").write_bytes(Manifest(origin, {"model.safetensors": record}).dump())
    return folder


def test_manifests_of_quantized_checkpoints(tmp_path: Path) -> None:
    folders = [write_manifest(tmp_path / name) for name in ("a/model", "b/model", "other")]
    found = read_inputs(None, None, folders).quantized
    assert [each.label for each in found] == ["a/model", "b/model", "other"]
    assert {(each.matrices, each.uncalibrated) for each in found} == {(quantized().matrices, quantized().uncalibrated)}
    assert found[0].formats == ("w4a8-channel",)
    with pytest.raises(ReportError, match=r"--quantized .*/a/model: given twice"):
        read_inputs(None, None, [*folders, tmp_path / "b" / ".." / "a" / "model"])
    deep = [write_manifest(tmp_path / name / "x" / "model") for name in ("a", "b")]
    assert [each.label for each in read_inputs(None, None, deep).quantized] == ["a/x/model", "b/x/model"]


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command_writes_the_page_or_says_what_is_wrong(tmp_path: Path) -> None:
    out, eval_file, sensitivity_file = tmp_path / "out.html", tmp_path / "e.json", tmp_path / "s.json"
    assert run(out) == (2, "flyray: give at least one of --eval, --sensitivity and --quantized\n")
    for folder in (tmp_path, tmp_path / "none"):
        code, words = run(out, "--quantized", folder)
        assert (code, f"{folder}: has no quantize.json" in words) == (2, True)
    code, words = run(out, "--sensitivity", sensitivity_file)
    assert (code, "s.json cannot be read" in words) == (2, True)
    sensitivity([]).write(sensitivity_file)
    assert run(out, "--sensitivity", sensitivity_file)[1].endswith("no group of experts was measured yet\n")
    assert not out.exists()
    write_figures(eval_file, some_figures())
    measured().write(sensitivity_file)
    folder = write_manifest(tmp_path / "model")
    code, words = run(out, "--eval", eval_file, "--sensitivity", sensitivity_file, "--quantized", folder)
    assert (code, words) == (0, f"wrote {out}\n")
    assert Page(out.read_text()).tags.count("svg") == 6 - 1  # this evaluation has no perplexity_ratio


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ReportError, match=r"pip install 'flyray\[plots\]'"):
        render(Inputs(None, measured(), ()))
