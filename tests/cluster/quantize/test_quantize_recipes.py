"""Recipes run to their end: linears in INT8, mixed experts, calibrated ones; and every format against NumPy's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gathered import write_statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_formats import weights_of
from quantized import parts_of, recipe_of
from sensitivities import sensitivity, unit
from source_checkpoints import NATIVE_QUANTIZATION, write_checkpoint
from tiny_checkpoint import write_tiny

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.statistics import fingerprint
from flyray.actors.statistics_plan import StatisticsPlan
from flyray.cluster.quantize.command import QuantizeInputs, quantize
from flyray.cluster.quantize.file_task import WorkSettings, quantize_files
from flyray.cluster.quantize.manifest import check_sums
from flyray.cluster.quantize.memory import MemoryBudget
from flyray.cluster.quantize.plan import plan_quantization
from flyray.cluster.quantize.recipe import load_recipe
from flyray.kernels import formats

EXPERTS = "model.layers.*.mlp.experts.*"
LINEARS = {"modules": ["*.self_attn.*_proj*", "*.mlp.shared_experts.*", "*.mlp.*_proj"], "format": "w8a8"}
KV = ("*.kv_b_proj",)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_int8_linears_beside_int8_experts_are_quark_s_layout(local_ray: None, tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of({"modules": [EXPERTS], "format": "w8a8"}, LINEARS, exclude=KV)
    report = quantize(tiny, tmp_path / "out", recipe, progress=False)
    source, made = Checkpoint(tiny), Checkpoint(tmp_path / "out")
    linears = made.formats.int8_linears
    assert made.formats.experts == "w8a8"
    assert "model.layers.0.mlp.down_proj" in linears
    assert "model.layers.2.self_attn.kv_a_proj_with_mqa" in linears
    assert not any("kv_b_proj" in name for name in linears)
    assert made.config["quantization_config"]["quant_method"] == "quark"
    assert report.format == "w8a8"
    assert {"gate_proj", "self_attn.o_proj", "shared_experts.up_proj", "mlp.down_proj"} <= set(report.per_kind)
    for module in linears:
        want = source.read(f"{module}.weight").double().numpy()
        got = weights_of("w8a8", parts_of(made, module))
        assert np.abs(got - want).max() <= np.abs(want).max(1).max() / 127 / 2 * 1.001
    assert check_sums(made.path) == []


def test_int8_linears_beside_w4a8_experts_are_flyray_s_second_version(
    local_ray: None, tiny: Path, tmp_path: Path
) -> None:
    quantize(tiny, tmp_path / "out", recipe_of({"modules": [EXPERTS], "format": "w4a8"}, LINEARS, exclude=KV))
    made = Checkpoint(tmp_path / "out")
    stated = made.config["quantization_config"]
    assert (stated["quant_method"], stated["version"], stated["format"]) == ("flyray", 2, "w4a8")
    assert made.expert_format() == "w4a8"
    assert {f"{made.prefix}{name}" for name in made.formats.int8_linears} == set(stated["linears"]["w8a8"])


def test_linears_alone_leave_native_experts_as_they_are(local_ray: None, tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "out", recipe_of({"modules": ["*.o_proj"], "format": "w8a8"}), progress=False)
    source, made = Checkpoint(tiny), Checkpoint(tmp_path / "out")
    assert made.expert_format() == "w4a16"
    assert len(made.formats.int8_linears) == 3
    for name in source.names:
        assert "o_proj" in name or torch.equal(source.read(name), made.read(name)), name


def test_a_mixed_recipe_keeps_to_its_file_and_budget(local_ray: None, tiny: Path, tmp_path: Path) -> None:
    units = [unit(layer, range(4 * half, 4 * half + 4), kl=0.1 * layer + half) for layer in (1, 2) for half in (0, 1)]
    losses = sensitivity(units).model_copy(update={"fingerprint": fingerprint(Checkpoint(tiny))})
    (tmp_path / "losses.json").write_text(losses.model_dump_json())
    mixed = {"low": {"format": "w4a8-channel"}, "high": {"format": "w8a8"}, "budget": "50%"}
    recipe = recipe_of({"modules": [EXPERTS], "mixed": mixed})
    report = quantize(
        tiny, tmp_path / "out", recipe, QuantizeInputs(sensitivity=tmp_path / "losses.json"), progress=False
    )
    made = Checkpoint(tmp_path / "out")
    assert made.expert_format() == report.format == "mixed"
    found = {(layer, expert): made.matrix_format(layer, expert) for layer in (1, 2) for expert in range(8)}
    assert found == {(layer, e): "w8a8" if e >= 4 else "w4a8-channel" for layer in (1, 2) for e in range(8)}
    assert set(report.per_format) == {"w8a8", "w4a8-channel"}
    assert report.per_format["w8a8"]["up_proj"] < report.per_format["w4a8-channel"]["up_proj"]
    assert report.predicted == pytest.approx(0.1 + 0.2)
    assert made.config["quantization_config"]["experts"]["1"] == {"w4a8-channel": "0-3", "w8a8": "4-7"}
    everything = QuantizeInputs(sensitivity=tmp_path / "losses.json", budget="100%")
    quantize(tiny, tmp_path / "high", recipe, everything, progress=False)
    assert Checkpoint(tmp_path / "high").expert_format() == "w8a8"


@pytest.fixture(scope="module")
def calibration(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of few tokens, so that some experts see none."""
    checkpoint = Checkpoint(tiny)
    model = ModelConfig.from_dict(checkpoint.config)
    plan = StatisticsPlan.of(checkpoint, model, [range(8)], "w4a16", moments_block=32)
    return write_statistics(tmp_path_factory.mktemp("calibration") / "made", plan, tokens=4)


def test_what_calibration_did_not_reach_is_named(
    local_ray: None, tiny: Path, calibration: Path, tmp_path: Path
) -> None:
    inputs = QuantizeInputs(calibration=calibration)
    recipe = load_recipe("w4a8-channel-calibrated")
    report = quantize(tiny, tmp_path / "out", recipe, inputs, progress=False)
    assert Checkpoint(tmp_path / "out").expert_format() == "w4a8-channel"
    assert report.uncalibrated
    assert all(name.endswith("_proj") and ".experts." in name for name in report.uncalibrated)
    assert len(report.uncalibrated) % 3 == 0
    assert len(report.uncalibrated) < 48
    assert report.uncalibrated == quantize(tiny, tmp_path / "out", recipe, inputs, progress=False).uncalibrated


def test_smoothing_multiplies_what_is_copied(local_ray: None, tiny: Path, calibration: Path, tmp_path: Path) -> None:
    """Norm times the gate's and the shared experts' columns is what it was, to the last bit."""
    inputs = QuantizeInputs(calibration=calibration)
    quantize(tiny, tmp_path / "out", load_recipe("w8a8-smooth"), inputs, progress=False)
    source, made = Checkpoint(tiny), Checkpoint(tmp_path / "out")
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert not torch.equal(source.read(norm), made.read(norm))
    for name in ("gate.weight", "shared_experts.up_proj.weight"):
        products = [
            checkpoint.read(f"model.layers.1.mlp.{name}").double() * checkpoint.read(norm).double()
            for checkpoint in (source, made)
        ]
        assert torch.equal(*products)


@settings(max_examples=25, deadline=None)
@given(
    format=st.sampled_from(["w4a8", "w8a8", "w4a8-channel"]),
    native=st.booleans(),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    scale=st.sampled_from([1e-4, 0.05, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_matrix_written_and_read_means_what_numpy_says(
    format: str,
    native: bool,
    rows: int,
    groups: int,
    scale: float,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The report's error, worked out again from the file's bytes in NumPy; and copied tensors are equal."""
    folder = tmp_path_factory.mktemp("formats")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64 * groups, generator=generator) * scale
    matrices = {f"model.layers.1.mlp.experts.0.{kind}_proj": weight * (1 + index) for index, kind in enumerate(KINDS)}
    tensors = {"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    for name, each in matrices.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in (as_native if native else as_bf16)(each).items()}
    quantization = NATIVE_QUANTIZATION if native else None
    source = Checkpoint(write_checkpoint(folder / "source", {"model.safetensors": tensors}, quantization))
    recipe = recipe_of({"modules": ["*.experts.*"], "format": format})
    plan = plan_quantization(source, folder / "out", "label", recipe, QuantizeInputs())
    (folder / "out").mkdir()
    *_, last = quantize_files(plan.files, WorkSettings(MemoryBudget(1 << 30)))
    assert last.record is not None
    (folder / "out" / "config.json").write_text('{"quantization_config": null}')
    made = Checkpoint(folder / "out")
    assert torch.equal(made.read("model.norm.weight"), tensors["model.norm.weight"])
    for error in last.record.matrices:
        want = weights_of("w4a16" if native else "bf16", parts_of(source, error.name))
        difference = np.sum((weights_of(format, parts_of(made, error.name)) - want) ** 2)
        assert error.norm == pytest.approx(np.sum(want**2), rel=1e-5)
        assert error.difference == pytest.approx(difference, rel=1e-3, abs=1e-9 * error.norm)


KINDS = ("gate", "up", "down")


def as_native(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scale = formats.quantize_native(weight)
    return {"weight_packed": formats.pack_native(values), "weight_scale": scale}


def as_bf16(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": weight.to(torch.bfloat16)}
