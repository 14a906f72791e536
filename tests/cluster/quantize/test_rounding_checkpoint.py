"""Calibrated recipes over a whole checkpoint: every tensor as its matrix's rounding gives it, and a model that answers
as the source does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gathered import write_statistics
from smoothed_checkpoint import write_plain

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.expert_format import EXPERT_TENSOR
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.statistics import Statistics, StatisticsPlan
from flyray.cluster.quantize.calibrated import Calibrated
from flyray.cluster.quantize.command import quantize
from flyray.cluster.quantize.plan_inputs import QuantizeInputs
from flyray.cluster.quantize.recipe import Recipe
from flyray.cluster.quantize.rounding import quantize_matrix
from flyray.kernels.reference_quantizer import ReferenceQuantizer
from flyray.kernels.select import select_kernels

EXPERTS = "model.layers.*.mlp.experts.*"
RECIPES = {
    "w4a8": {"format": "w4a8", "clip": "energy", "error_feedback": True},
    "w4a8-channel": {"format": "w4a8-channel", "clip": "mse", "error_feedback": True},
    "w8a8": {"format": "w8a8", "clip": "energy"},
}


def recipe(format: str) -> Recipe:
    """Smoothed; the shared experts in INT8 too, for smoothing reaches them whether they are rounded or copied."""
    rules = [{"modules": [EXPERTS], **RECIPES[format]}]
    if format == "w8a8":
        rules.append({"modules": ["*.mlp.shared_experts.*"], "format": "w8a8"})
    return Recipe.model_validate({"name": format, "version": 1, "rules": rules, "smoothing": 0.5})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("source") / "plain")


@pytest.fixture(scope="module")
def statistics(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = Checkpoint(source)
    config = ModelConfig.from_dict(checkpoint.config)
    plan = StatisticsPlan.of(checkpoint, config, [range(config.n_routed_experts)], "bf16", 32)
    return write_statistics(tmp_path_factory.mktemp("statistics") / "gathered", plan, 100)


@pytest.mark.parametrize("format", sorted(RECIPES))
def test_every_tensor_is_rounded_or_multiplied_as_calibration_says(
    format: str, source: Path, statistics: Path, tmp_path: Path, local_ray: None
) -> None:
    chosen = recipe(format)
    quantize(source, tmp_path / "made", chosen, QuantizeInputs(calibration=statistics), progress=False)
    before, after = Checkpoint(source), Checkpoint(tmp_path / "made")
    calibrated = Calibrated(Statistics.open(statistics), chosen.smoothing)
    for name in before.names:
        module = name.rpartition(".")[0]
        rule = chosen.rule_for(module) if name.endswith("proj.weight") else None
        if rule is not None and rule.scheme is not None:
            weight = {"weight": before.read(name)}
            inputs = calibrated.matrix(module)
            made = quantize_matrix(rule.scheme, "bf16", weight, inputs, ReferenceQuantizer(), 1)
            for part, tensor in made.parts.items():
                assert torch.equal(after.read(f"{module}.{part}"), tensor), f"{module}.{part}"
        else:
            assert not EXPERT_TENSOR.fullmatch(name)
            factor = calibrated.copied(name)
            expected = before.read(name)
            expected = expected if factor is None else (expected.float() * factor).to(expected.dtype)
            assert torch.equal(after.read(name), expected), name
    kernels = select_kernels("cpu", 1)
    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    plain, rounded = (
        SingleProcessModel.load(path, "auto", kernels, 64).prefill(tokens) for path in (source, tmp_path / "made")
    )
    assert float((plain - rounded).std() / plain.std()) < (0.1 if format == "w8a8" else 0.5)
