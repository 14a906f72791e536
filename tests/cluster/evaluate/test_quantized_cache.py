"""Kept checkpoints: made once, made again when source or code change, never taken half-made."""

import ast
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from byte_model import write_byte_model

from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.code_version import code_version, digest
from flyray.cluster.evaluate.quantized_cache import REPORT, QuantizedCache
from flyray.cluster.quantize.fingerprint import CODE
from flyray.cluster.quantize.recipe import load_recipe


def test_made_once_for_a_content(tmp_path: Path) -> None:
    write_byte_model(tmp_path / "model")
    cache = QuantizedCache(tmp_path / "work", tmp_path / "model")
    recipe = load_recipe("w4a8")
    assert cache.kept(recipe) is None
    [made] = cache.ensure(["w4a8"]).values()
    assert Checkpoint(made.path).expert_format() == "w4a8"
    names = [figure.name for figure in made.figures()]
    assert names == ["weight_error.w4a8", "seconds.quantize.w4a8"]
    written = (made.path / "config.json").stat().st_mtime_ns

    again = QuantizedCache(tmp_path / "work", tmp_path / "model")
    assert again.ensure(["w4a8"])["w4a8"] == made
    assert (made.path / "config.json").stat().st_mtime_ns == written

    (made.path / REPORT).unlink()  # as after a crash between the last tensor and the report
    assert again.kept(recipe) is None

    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"bos_token_id": 3}))
    other = QuantizedCache(tmp_path / "work", tmp_path / "model")
    assert other.folder != cache.folder


def test_digest_sees_names_and_contents(tmp_path: Path) -> None:
    for name, content in [("a", "1"), ("b", "2"), ("c", "1")]:
        (tmp_path / name).write_text(content)
    a, b, c = (tmp_path / name for name in "abc")
    assert digest([a, b]) == digest([b, a])
    assert len({digest([a]), digest([b]), digest([c]), digest([a, b]), digest([])}) == 5


def test_code_version_covers_a_package_and_names_what_is_missing() -> None:
    assert code_version("kernels", "cluster.demo") == code_version("cluster.demo", "kernels")
    assert code_version("kernels") != code_version("kernels.formats")
    with pytest.raises(ValueError, match=r"no module kernels\.nothing"):
        code_version("kernels.nothing")


ROOT = Path(__file__).parents[3]
# What quantizing imports besides, and which decides no byte: words for people, and what the ends are held to.
DECIDES_NOTHING = {
    "actors.model.config": "checks a model's sizes, of which the source's config.json and headers have all",
    "actors.model.fields": "of actors.model.config",
    "actors.model.rope_config": "of actors.model.config",
    "actors.read_ahead": "reads the bytes that are there, only earlier",
    "cluster.byte_sizes": "a budget and a memory, of which a budget counts as it is written",
    "cluster.code_version": "names the code",
    "cluster.evaluate.intervals": "the type of numbers in a sensitivity file",
    "cluster.fields": "words of an error",
    "cluster.figures": "writes what was measured",
    "cluster.names": "words of an error",
    "cluster.scratch_folder": "where what Quark reads and writes lies while it runs",
    "cluster.yaml_file": "a recipe counts by its content",
}


def test_the_code_that_decides_bytes_is_all_code_that_quantizing_imports() -> None:
    starts = ("file_task", "metadata", "plan", "fingerprint")
    imported = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in imports(ROOT / "cluster" / "quantize" / f"{name}.py" for name in starts)
    }
    covered = {name for name in imported if any(f"{name}.".startswith(f"{part}.") for part in CODE)}
    assert imported - covered == set(DECIDES_NOTHING)


def imports(starts: Iterable[Path]) -> set[Path]:
    """The files and all that they import of flyray, directly or not."""
    found: set[Path] = set()
    waiting = list(starts)
    while waiting:
        if (file := waiting.pop()) not in found:
            found.add(file)
            waiting += imported_by(file)
    return found


def imported_by(file: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
            yield from (name for name in names if name.is_file())
