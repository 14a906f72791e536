"""What cannot be quantized is refused before anything is written; what fails halfway leaves no checkpoint."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized import quantize_by, shipped_targets
from source_checkpoints import (
    NATIVE_QUANTIZATION,
    PREFIX,
    native_checkpoint,
    native_tensors,
    write_checkpoint,
)

from flyray.actors.checkpoint import CheckpointError
from flyray.cluster.quantize.command import quantize_all
from flyray.cluster.quantize.matrix import QuantizeError
from flyray.cluster.quantize.plan import check_space
from flyray.cluster.quantize.quark_quantizer import ExtensionLock, require_quark
from flyray.cluster.quantize.recipe import load_recipe

EXPERT = "model.layers.1.mlp.experts.2.down_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return native_checkpoint(tmp_path / "source")


@pytest.fixture(scope="module")
def folded(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in `w4a8`, which needs no Quark."""
    folder = tmp_path_factory.mktemp("folded")
    quantize_by("w4a8", native_checkpoint(folder / "source"), folder / "w4a8")
    return folder / "w4a8"


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_unknown_recipes_are_told_the_shipped_ones() -> None:
    with pytest.raises(QuantizeError, match="unknown recipe 'int4'; shipped are mixed, w4a8, w4a8-channel"):
        load_recipe("int4")


def test_targets_that_would_lose_something_are_refused(source: Path, tmp_path: Path) -> None:
    before = files_below(source)
    with pytest.raises(QuantizeError, match="source and target are the same folder"):
        quantize_by("w4a8", source, source.parent / "." / "source", overwrite=True)
    assert files_below(source) == before
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(QuantizeError, match=r"full: is not empty; pass --overwrite"):
        quantize_by("w4a8", source, full)
    assert files_below(full) == ["notes.txt"]
    with pytest.raises(QuantizeError, match="is a file, not a folder"):
        quantize_by("w4a8", source, full / "notes.txt", overwrite=True)
    targets = {"w4a8": tmp_path / "x", "w8a8": tmp_path / "y" / ".." / "x"}
    with pytest.raises(QuantizeError, match="two recipes cannot share a folder"):
        quantize_all(source, shipped_targets(targets))
    with pytest.raises(QuantizeError, match="workers is 0"):
        quantize_by("w4a8", source, tmp_path / "x", workers=0)
    with pytest.raises(QuantizeError, match=r"GB are needed, .* GB are free"):
        check_space(tmp_path / "deep" / "er", 1 << 60)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("sizes", "format", "message"),
    [
        # The published layout refuses these when it is read ...
        ({"intermediate": 40}, "w8a8", r"experts\.0\.down_proj has 40 columns; w4a16 needs a multiple of 32"),
        ({"intermediate": 36}, "w8a8", r"experts\.0\.down_proj has 40 columns; w4a16 needs a multiple of 32"),
        # ... and this one fits its groups, but not two multipliers a byte.
        ({"intermediate": 96}, "w4a8", r"experts\.0\.down_proj has 96 columns, not a multiple of 64"),
    ],
)
def test_dimensions_that_do_not_fit_are_named(tmp_path: Path, sizes: dict[str, int], format: str, message: str) -> None:
    source = native_checkpoint(tmp_path / "source", **sizes)
    with pytest.raises((QuantizeError, CheckpointError), match=message):
        quantize_by(format, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bf16_dimensions_that_do_not_fit_are_named(tmp_path: Path) -> None:
    name = f"{PREFIX}model.layers.1.mlp.experts.0.gate_proj.weight"
    weight = {name: torch.zeros(8, 36, dtype=torch.bfloat16)}
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": weight}, None)
    for format, multiple in (("w4a8", 64), ("w4a8-channel", 8)):
        with pytest.raises(QuantizeError, match=rf"gate_proj has 36 columns, not a multiple of {multiple}"):
            quantize_by(format, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_padded_matrix_is_named(local_ray: None, tmp_path: Path) -> None:
    tensors = native_tensors()
    tensors[f"{PREFIX}{EXPERT}.weight_shape"] = torch.tensor([128, 60], dtype=torch.int32)
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": tensors}, NATIVE_QUANTIZATION)
    with pytest.raises(QuantizeError, match=rf"{EXPERT}\.weight_shape says \[128, 60\].* holds \[128, 64\]"):
        quantize_by("w4a8", source, tmp_path / "out")


def test_a_quantized_source_is_refused(folded: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="already quantized to w4a8; quantize the native"):
        quantize_by("w8a8", folded, tmp_path / "out")


def test_missing_quark_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_quark()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    with pytest.raises(QuantizeError, match=r"amd-quark is not installed: pip install 'flyray\[quantize\]'"):
        require_quark()


def test_a_build_that_was_killed_does_not_block_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits for ever on the file that a killed build leaves; two builds at once must still not meet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    stale = tmp_path / "quark_hw_emulation" / "lock"
    stale.parent.mkdir()
    stale.touch()
    with ExtensionLock(tmp_path):
        assert not stale.exists()
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)
        with (tmp_path / "flyray.lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "flyray.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def damaged(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = native_tensors()
    change(tensors)
    shutil.rmtree(source)
    first = {name: tensor for name, tensor in tensors.items() if ".experts.2." not in name}
    second = {name: tensor for name, tensor in tensors.items() if name not in first}
    return write_checkpoint(source, {"a.safetensors": first, "b.safetensors": second}, NATIVE_QUANTIZATION)


def test_a_bad_weight_met_halfway_leaves_no_checkpoint(local_ray: None, source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}{EXPERT}.weight_scale"][5, 1] = -1

    damaged(source, change)
    with pytest.raises(QuantizeError, match=rf"{EXPERT}: group scale of row 5, group 1 is -1\.0"):
        quantize_by("w4a8", source, tmp_path / "out")
    assert files_below(tmp_path / "out") == ["a.safetensors", "quantize.json"]
    damaged(source, lambda tensors: None)
    with pytest.raises(QuantizeError, match=r"out: was made from another source; --overwrite begins anew"):
        quantize_by("w4a8", source, tmp_path / "out")


def test_a_bad_weight_met_at_once_leaves_nothing(local_ray: None, source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}{EXPERT.replace('.2.', '.0.')}.weight_scale"][5, 1] = -1

    damaged(source, change)
    with pytest.raises(QuantizeError, match=r"experts\.0\.down_proj: group scale of row 5, group 1 is -1\.0"):
        quantize_by("w4a8", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_with_overwrite_spares_other_files(local_ray: None, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize_by("w4a8", source, target)
    (target / "notes.txt").write_text("mine")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}{EXPERT}.weight_scale"][0, 0] = -1

    damaged(source, change)
    with pytest.raises(QuantizeError, match=EXPERT):
        quantize_by("w4a8", source, target, overwrite=True)
    assert {"a.safetensors", "notes.txt", "quantize.json"} <= set(files_below(target))
    assert not {"config.json", "SHA256SUMS", "b.safetensors"} & set(files_below(target))


def test_index_and_config_come_last(folded: Path) -> None:
    """Without them the folder does not open: an interrupted run is never taken for a whole checkpoint."""
    newest = max(folded.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "config.json"
    weight_map = json.loads((folded / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {path.name for path in folded.glob("*.safetensors")}
