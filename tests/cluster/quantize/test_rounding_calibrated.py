"""What `Calibrated` says of each matrix and each tensor beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gathered import write_statistics
from torch import Tensor

from flyray.actors.statistics import LayerStatistics, Statistics, StatisticsPlan
from flyray.actors.statistics_writer import ShardStatistics, StatisticsFolder
from flyray.cluster.quantize.calibrated import Calibrated
from flyray.cluster.quantize.error_feedback import SecondMoments
from flyray.cluster.quantize.matrix import QuantizeError
from flyray.cluster.quantize.rounding import MatrixInputs
from flyray.cluster.quantize.smoothing import smoothing_factors

HIDDEN, INNER, BLOCK, EXPERTS = 64, 32, 16, 8
LAYER = "model.layers.2.mlp"


def folder(path: Path, tokens: int = 12, block: int = BLOCK) -> Statistics:
    plan = StatisticsPlan("f" * 64, "bf16", (1, 2), (range(3), range(3, EXPERTS)), 2, HIDDEN, INNER, block)
    return Statistics.open(write_statistics(path / f"{tokens}-{block}", plan, tokens))


@pytest.fixture
def statistics(tmp_path: Path) -> Statistics:
    return folder(tmp_path)


def reached(layer: LayerStatistics) -> int:
    return int(layer.count.argmax())


def blocks(inputs: MatrixInputs) -> Tensor:
    assert isinstance(inputs.moments, SecondMoments)
    return inputs.moments.blocks


def energy(inputs: MatrixInputs) -> Tensor:
    assert inputs.energy is not None
    return inputs.energy


def test_gate_and_up_read_the_layers_input_and_down_the_experts_own(statistics: Statistics) -> None:
    layer = statistics.layer(2)
    expert = reached(layer)
    count = layer.count[expert]
    calibrated = Calibrated(statistics, None)
    for kind in ("gate_proj", "up_proj"):
        found = calibrated.matrix(f"{LAYER}.experts.{expert}.{kind}")
        assert torch.equal(energy(found), layer.input_energy[expert] / count)
        assert layer.input_moments is not None
        assert torch.equal(blocks(found), layer.input_moments)
        assert not found.smooths
    down = calibrated.matrix(f"{LAYER}.experts.{expert}.down_proj")
    inner = layer.inner_moments(expert)
    assert inner is not None
    assert torch.equal(energy(down), layer.inner_energy[expert] / count)
    assert torch.equal(blocks(down), inner)
    assert down.moments is not None
    assert down.moments.tokens == count


def test_shared_experts_read_what_all_routed_experts_read(statistics: Statistics) -> None:
    layer = statistics.layer(2)
    found = Calibrated(statistics, None).matrix(f"{LAYER}.shared_experts.up_proj")
    assert torch.allclose(energy(found), layer.input_energy.sum(0) / 24)
    assert layer.input_moments is not None
    assert torch.equal(blocks(found), layer.input_moments)
    assert found.moments is not None
    assert found.moments.tokens == 12


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.shared_experts.down_proj",
        "model.layers.2.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.experts.0.gate_proj",
        "lm_head",
    ],
)
def test_of_what_is_not_gathered_nothing_is_said(statistics: Statistics, name: str) -> None:
    calibrated = Calibrated(statistics, 0.5)
    assert calibrated.matrix(name) == MatrixInputs()
    assert calibrated.copied(f"{name}.weight") is None


def test_experts_without_a_token_have_no_energy_and_no_moments_but_the_layers_smoothing(tmp_path: Path) -> None:
    statistics = folder(tmp_path, tokens=1)
    assert len(statistics.unreached) == 2 * (EXPERTS - 2)
    number, expert = statistics.unreached[-1]
    calibrated = Calibrated(statistics, 0.5)
    factor = smoothing_factors(statistics.layer(number).input_absmax.amax(0), 0.5)
    for kind in ("gate_proj", "up_proj", "down_proj"):
        found = calibrated.matrix(f"model.layers.{number}.mlp.experts.{expert}.{kind}")
        assert (found.energy, found.moments) == (None, None)
        assert found.column_factor is not None
        assert torch.equal(found.column_factor, torch.ones(INNER) if kind == "down_proj" else factor)
    assert Calibrated(statistics, None).matrix(f"model.layers.{number}.mlp.experts.{expert}.up_proj") == MatrixInputs()


def test_smoothing_divides_the_activations_and_multiplies_what_reads_them(statistics: Statistics) -> None:
    layer = statistics.layer(2)
    expert = reached(layer)
    plain, smooth = Calibrated(statistics, None), Calibrated(statistics, 1.0)
    outer = smoothing_factors(layer.input_absmax.amax(0), 1.0)
    inner = smoothing_factors(layer.inner_absmax[expert], 1.0)
    assert len(outer.unique()) > 1
    assert len(inner.unique()) > 1
    for kind, factor, rows in (
        ("gate_proj", outer, None),
        ("up_proj", outer, 1 / inner),
        ("down_proj", inner, None),
    ):
        name = f"{LAYER}.experts.{expert}.{kind}"
        before, after = plain.matrix(name), smooth.matrix(name)
        assert after.column_factor is not None
        assert torch.equal(after.column_factor, factor)
        assert (after.row_factor is None) == (rows is None)
        if rows is not None and after.row_factor is not None:
            assert torch.equal(after.row_factor, rows)
        assert torch.equal(energy(after), energy(before) / factor**2)
        cut = factor.view(-1, BLOCK)
        assert torch.equal(blocks(after), blocks(before) / cut.unsqueeze(1) / cut.unsqueeze(2))
    shared = smooth.matrix(f"{LAYER}.shared_experts.gate_proj")
    assert shared.column_factor is not None
    assert torch.equal(shared.column_factor, outer)


def test_tensors_that_stay_are_multiplied_with_the_same_factors(statistics: Statistics) -> None:
    layer = statistics.layer(2)
    expert = reached(layer)
    outer = smoothing_factors(layer.input_absmax.amax(0), 1.0)
    inner = smoothing_factors(layer.inner_absmax[expert], 1.0)
    calibrated = Calibrated(statistics, 1.0)
    expected = {
        "model.layers.2.post_attention_layernorm.weight": 1 / outer,
        f"{LAYER}.gate.weight": outer,
        f"{LAYER}.gate.e_score_correction_bias": None,
        f"{LAYER}.shared_experts.gate_proj.weight": outer,
        f"{LAYER}.shared_experts.up_proj.weight": outer,
        f"{LAYER}.shared_experts.down_proj.weight": None,
        f"{LAYER}.experts.{expert}.gate_proj.weight": outer,
        f"{LAYER}.experts.{expert}.up_proj.weight": outer / inner.unsqueeze(1),
        f"{LAYER}.experts.{expert}.down_proj.weight": inner,
        "model.layers.2.input_layernorm.weight": None,
        "model.layers.0.post_attention_layernorm.weight": None,
        "model.norm.weight": None,
    }
    for name, factor in expected.items():
        found = calibrated.copied(name)
        assert (found is None) == (factor is None), name
        assert found is None or factor is None or torch.equal(found, factor), name
        assert Calibrated(statistics, None).copied(name) is None


def test_packed_experts_that_stay_as_they_are_are_refused_with_smoothing(statistics: Statistics) -> None:
    name = f"{LAYER}.experts.3.up_proj.weight_packed"
    assert Calibrated(statistics, None).copied(name) is None
    with pytest.raises(QuantizeError, match=r"experts\.3\.up_proj\.weight_packed: .* packed INT4 cannot take"):
        Calibrated(statistics, 0.5).copied(name)


def test_statistics_without_moments_have_none(tmp_path: Path) -> None:
    statistics = folder(tmp_path, block=0)
    calibrated = Calibrated(statistics, None)
    for kind in ("up_proj", "down_proj"):
        found = calibrated.matrix(f"{LAYER}.experts.{reached(statistics.layer(2))}.{kind}")
        assert found.energy is not None
        assert found.moments is None


def test_an_expert_that_the_statistics_do_not_have_is_refused(statistics: Statistics) -> None:
    with pytest.raises(QuantizeError, match=r"experts\.8\.up_proj: the statistics have experts 0\.\.7"):
        Calibrated(statistics, None).matrix(f"{LAYER}.experts.8.up_proj")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [("input_energy", "gate_proj"), ("inner_energy", "down_proj"), ("input_absmax", "up_proj")],
)
def test_statistics_that_are_not_finite_are_refused_by_name(tmp_path: Path, tensor: str, kind: str) -> None:
    plan = StatisticsPlan("f" * 64, "bf16", (2,), (range(1),), 1, HIDDEN, INNER, 0)
    writing = StatisticsFolder(tmp_path / "bad", plan)
    shard = ShardStatistics(tmp_path / "bad", plan, 0)
    sums = shard.layer(2)
    sums.count[0] = 1
    getattr(sums, tensor)[0, 5] = float("nan")
    shard.flush()
    writing.complete(1)
    calibrated = Calibrated(Statistics.open(tmp_path / "bad"), 0.5)
    with pytest.raises(QuantizeError, match=rf"bad: model\.layers\.2\.mlp\.experts\.0\.{kind}: .* not finite"):
        calibrated.matrix(f"{LAYER}.experts.0.{kind}")
    if tensor == "input_absmax":
        with pytest.raises(QuantizeError, match=r"bad: model\.layers\.2\.mlp\.gate\.weight: .* not finite"):
            calibrated.copied(f"{LAYER}.gate.weight")


def test_the_factor_of_a_layers_input_is_worked_out_once(statistics: Statistics) -> None:
    calibrated = Calibrated(statistics, 0.5)
    kinds = ("gate_proj", "up_proj")
    moments = [calibrated.matrix(f"{LAYER}.experts.{each}.{kind}").moments for each in range(2) for kind in kinds]
    moments.append(calibrated.matrix(f"{LAYER}.shared_experts.up_proj").moments)
    assert len({id(each) for each in moments if each is not None}) == 1
    down = f"{LAYER}.experts.{reached(statistics.layer(2))}.down_proj"
    assert calibrated.matrix(down) is calibrated.matrix(down)
