"""What comes out, format by format: tensors, metadata, numbers of the report; and Quark itself as the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from numpy_formats import weights_of
from quantized import ALL, Made, parts_of, quantize_by
from source_checkpoints import (
    NATIVE_QUANTIZATION,
    OTHER_FILES,
    PREFIX,
    expert_matrices,
    native_tensors,
    write_checkpoint,
)

from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.figures import read_figures
from flyray.cluster.quantize.command import QuantizeInputs, run
from flyray.cluster.quantize.manifest import Manifest
from flyray.cluster.quantize.matrix import QuantizeError, dequantize

QUARK_SCHEMES = {"w8a8-fp8": "ptpc_fp8", "w4a8-channel": "int4_fp8"}
# Relative Frobenius errors of Gaussian weights at K = 64 and 128, with room for the law of few columns.
BOUNDS = {"w4a8": 0.02, "w8a8": 0.008, "w8a8-fp8": 0.03, "w4a8-channel": 0.13}


def weights(checkpoint: Checkpoint, matrix: str) -> torch.Tensor:
    return dequantize(checkpoint.expert_format(), parts_of(checkpoint, matrix))


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("kind", ["from_native", "from_bf16", "from_scattered"])
def test_a_target_is_a_checkpoint_of_its_format(kind: str, format: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(kind)
    source, target = Checkpoint(made.source), Checkpoint(made.targets[format])
    assert target.expert_format() == format
    for name in source.names:
        if ".experts." not in name:
            assert same_bytes(source.read(name), target.read(name)), name
    for name, content in OTHER_FILES.items():
        assert (target.path / name).read_text() == content
    index = json.loads((target.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(target.entry(name).bytes for name in target.names)
    assert len(index["weight_map"]) == len(target.names)
    assert not list(target.path.glob(".*"))


@pytest.mark.parametrize("format", ALL)
def test_config_says_what_was_done_and_no_more(from_native: Made, format: str) -> None:
    config = Checkpoint(from_native.targets[format]).config
    assert "quantization_config" not in config["text_config"]
    assert config["text_config"]["hidden_size"] == 128
    stated = config["quantization_config"]
    assert stated["quant_method"] == ("flyray" if format == "w4a8" else "quark")
    assert "language_model.model.layers.1.mlp.gate" in stated["exclude"]
    assert "vision_tower.blocks.0.wqkv" in stated["exclude"]
    assert not [module for module in stated["exclude"] if ".experts." in module or "norm" in module]
    if format == "w8a8":
        layers = stated["global_quant_config"]
        assert (layers["weight"]["dtype"], layers["weight"]["qscheme"], layers["weight"]["is_dynamic"]) == (
            "int8",
            "per_channel",
            False,
        )
        assert layers["weight"]["ch_axis"] == 0
        assert (layers["input_tensors"]["dtype"], layers["input_tensors"]["is_dynamic"]) == ("int8", True)
        assert layers["input_tensors"]["ch_axis"] == 1
        assert stated["export"]["weight_format"] == "real_quantized"


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("kind", ["from_native", "from_bf16"])
def test_report_is_the_error_measured_again(kind: str, format: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(kind)
    report = made.reports[format]
    source, target = Checkpoint(made.source), Checkpoint(made.targets[format])
    difference: dict[str, float] = {}
    norm: dict[str, float] = {}
    relative: dict[str, float] = {}
    for matrix in expert_matrices():
        want = weights(source, matrix).double().numpy()
        off = np.sum((weights(target, matrix).double().numpy() - want) ** 2)
        kind_name = matrix.rpartition(".")[2]
        difference[kind_name] = difference.get(kind_name, 0) + off
        norm[kind_name] = norm.get(kind_name, 0) + np.sum(want**2)
        relative[matrix] = float(np.sqrt(off / np.sum(want**2)))
    overall = float(np.sqrt(sum(difference.values()) / sum(norm.values())))
    assert report.weight_error == pytest.approx(overall, rel=1e-6)
    assert report.per_kind == pytest.approx({k: np.sqrt(difference[k] / norm[k]) for k in norm}, rel=1e-6)
    assert [error.name for error in report.worst] == sorted(relative, key=lambda name: -relative[name])[:5]
    assert report.bytes_before == sum(source.entry(name).bytes for name in source.names)
    assert report.bytes_after == sum(target.entry(name).bytes for name in target.names)
    assert report.seconds > 0
    if kind == "from_native":
        assert 0 < report.weight_error < BOUNDS[format]


def test_w4a8_keeps_the_native_nibbles(from_native: Made) -> None:
    source, target = Checkpoint(from_native.source), Checkpoint(from_native.targets["w4a8"])
    for matrix, (rows, columns) in expert_matrices().items():
        assert torch.equal(source.read(f"{matrix}.weight_packed"), target.read(f"{matrix}.weight_packed"))
        assert target.read(f"{matrix}.weight_shape").tolist() == [rows, columns]
        assert target.entry(f"{matrix}.weight_multiplier").shape == (rows, columns // 64)


@pytest.mark.parametrize("format", ALL)
def test_scales_in_another_file_change_nothing(from_native: Made, from_scattered: Made, format: str) -> None:
    one, other = Checkpoint(from_native.targets[format]), Checkpoint(from_scattered.targets[format])
    assert set(one.names) == set(other.names)
    for name in one.names:
        assert same_bytes(one.read(name), other.read(name)), name


@ray.remote(num_cpus=1)
def quark_directly(source: str, scheme: str, target: str) -> None:
    """Quark's own export, without anything of flyray's but the import."""
    from flyray.cluster.quantize.quark_quantizer import import_quark

    quark = import_quark()
    config = quark.LLMTemplate.get("kimi_k25").get_config(scheme=scheme)
    quark.ModelQuantizer(config).direct_quantize_checkpoint(source, target, device="cpu")


@pytest.mark.parametrize("format", list(QUARK_SCHEMES))
@pytest.mark.parametrize("kind", ["from_native", "from_bf16"])
def test_quark_s_own_export_loads_and_is_the_same(
    kind: str, format: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made: Made = request.getfixturevalue(kind)
    ray.get(quark_directly.remote(str(made.source), QUARK_SCHEMES[format], str(tmp_path / "quark")))
    quark, ours = Checkpoint(tmp_path / "quark"), Checkpoint(made.targets[format])
    assert quark.expert_format() == format
    assert quark.config == ours.config
    assert set(quark.names) == set(ours.names)
    for name in quark.names:
        assert same_bytes(quark.read(name), ours.read(name)), name
        assert quark.entry(name).file.name == ours.entry(name).file.name
    for matrix in expert_matrices():
        assert torch.equal(weights(quark, matrix), weights(ours, matrix))


def test_command_prints_and_writes_figures(
    local_ray: None, from_native: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = from_native.reports["w4a8"]
    code = run(
        from_native.source, tmp_path / "out", "w4a8", QuantizeInputs(), workers=1, json_path=tmp_path / "figures.json"
    )
    assert code == 0
    figures = read_figures(tmp_path / "figures.json")
    assert figures["weight_error.w4a8"].value == report.weight_error
    assert figures["bytes.w4a8"].value == report.bytes_after
    assert figures["seconds.quantize.w4a8"].value > 0
    assert figures["weight_error.w4a8.down_proj"].value == report.per_kind["down_proj"]
    printed = capsys.readouterr().out
    assert f"{report.weight_error:.3%}" in printed
    assert report.worst[0].name in printed


def test_what_quark_is_refused_halfway_leaves_no_checkpoint(from_native: Made, tmp_path: Path) -> None:
    tensors = native_tensors()
    scale = f"{next(reversed(expert_matrices()))}.weight_scale"
    tensors[f"{PREFIX}{scale}"][5, 1] = float("nan")
    last = {f"{PREFIX}{scale}": tensors.pop(f"{PREFIX}{scale}")}
    packed = f"{PREFIX}{scale.replace('weight_scale', 'weight_packed')}"
    last[packed] = tensors.pop(packed)
    files = {"a.safetensors": tensors, "b.safetensors": last}
    source = write_checkpoint(tmp_path / "source", files, NATIVE_QUANTIZATION)
    with pytest.raises(QuantizeError, match=rf"{scale} holds values that are not finite"):
        quantize_by("w8a8", source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("b.safetensors"))


def test_overwrite_replaces_the_checkpoint_and_nothing_else(local_ray: None, from_native: Made, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize_by("w4a8", from_native.source, target)
    (target / "stale.safetensors").write_bytes(b"old")
    (target / "notes.txt").write_text("mine")
    quantize_by("w4a8", from_native.source, target, overwrite=True)
    assert not (target / "stale.safetensors").exists()
    assert (target / "notes.txt").read_text() == "mine"
    assert Checkpoint(target).expert_format() == "w4a8"


def test_rounding_bf16_to_int4_is_what_w4a8_costs_there(from_bf16: Made, from_native: Made) -> None:
    """From bf16 the INT4 rounding itself is lost, from native only the folding of scales."""
    assert from_bf16.reports["w4a8"].weight_error > 4 * from_native.reports["w4a8"].weight_error
    assert from_bf16.reports["w4a8"].weight_error < 0.12


def test_the_demo_model_folds_within_two_percent(local_ray: None, tmp_path: Path) -> None:
    report = quantize_by("w4a8", DEMO_MODEL, tmp_path / "out")
    assert report.weight_error < 0.02
    assert report.worst[0].relative < 0.03
    assert report.bytes_after < report.bytes_before
    target = Checkpoint(tmp_path / "out")
    assert target.expert_format() == "w4a8"
    assert NATIVE_QUANTIZATION["quant_method"] != target.config["quantization_config"]["quant_method"]


def test_every_format_means_what_numpy_says(from_native: Made, from_bf16: Made) -> None:
    for made in (from_native, from_bf16):
        for format, folder in made.targets.items():
            checkpoint, manifest = Checkpoint(folder), Manifest.read(folder)
            source = Checkpoint(made.source)
            for record in manifest.files.values():
                for error in record.matrices:
                    want = weights_of(source.expert_format(), parts_of(source, error.name))
                    off = np.sum((weights_of(format, parts_of(checkpoint, error.name)) - want) ** 2)
                    assert error.difference == pytest.approx(off, rel=1e-4)
