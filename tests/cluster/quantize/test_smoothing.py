"""Smoothing: powers of two that even channels out, and leave an unquantized model exactly as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gathered import write_statistics
from hypothesis import given
from hypothesis import strategies as st
from smoothed_checkpoint import write_plain, write_smoothed
from torch import Tensor

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.statistics import Statistics, StatisticsPlan
from flyray.cluster.quantize.calibrated import Calibrated
from flyray.cluster.quantize.matrix import dequantize
from flyray.cluster.quantize.recipe import Scheme
from flyray.cluster.quantize.rounding import MatrixInputs, quantize_matrix
from flyray.cluster.quantize.smoothing import LARGEST_EXPONENT, smoothing_factors
from flyray.kernels.formats import dequantize_rows, quantize_int8_rows
from flyray.kernels.reference_quantizer import ReferenceQuantizer
from flyray.kernels.select import select_kernels

magnitudes = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=20)


@given(magnitudes, st.floats(0, 1))
def test_factors_are_powers_of_two_and_grow_with_the_channel(values: list[float], exponent: float) -> None:
    absmax = torch.tensor(values)
    factors = smoothing_factors(absmax, exponent)
    powers = factors.log2()
    assert torch.equal(powers, powers.round())
    assert powers.abs().max() <= LARGEST_EXPONENT
    assert bool((factors[absmax == 0] == 1).all())
    used = absmax[absmax > 0].argsort()
    assert bool((factors[absmax > 0][used].diff() >= 0).all())


def test_factors_are_the_nearest_powers_of_the_ratio_to_the_geometric_mean() -> None:
    absmax = torch.tensor([1.0, 4.0, 16.0, 0.0])
    assert smoothing_factors(absmax, 0.0).tolist() == [1, 1, 1, 1]
    assert smoothing_factors(absmax, 0.5).tolist() == [0.5, 1, 2, 1]
    assert smoothing_factors(absmax, 1.0).tolist() == [0.25, 1, 4, 1]
    assert smoothing_factors(torch.tensor([1e-12, 1.0, 1e12]), 1.0).tolist() == [2**-8, 1, 2**8]
    assert smoothing_factors(torch.zeros(3), 0.5).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("absmax", "exponent", "says"),
    [
        (torch.ones(2), 1.5, "smoothing is 1.5, expected an exponent of 0..1"),
        (torch.tensor([1.0, float("nan")]), 0.5, "negative or not finite"),
        (torch.tensor([1.0, float("inf")]), 0.5, "negative or not finite"),
        (torch.tensor([1.0, -1.0]), 0.5, "negative or not finite"),
    ],
)
def test_what_is_no_magnitude_or_exponent_is_refused(absmax: Tensor, exponent: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        smoothing_factors(absmax, exponent)


@pytest.mark.parametrize(("outliers", "at_most"), [(60.0, 0.4), (1.0, 1.1)])
def test_smoothing_pays_where_few_channels_are_large_and_costs_little_where_none_is(
    outliers: float, at_most: float
) -> None:
    """Output error with activations and weights both in INT8, against the same without smoothing."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 512, generator=generator)
    inputs[:, ::100] *= outliers
    weight = torch.randn(128, 512, generator=generator).bfloat16()
    scheme = Scheme(format="w8a8")

    def error(factor: Tensor) -> float:
        matrix = MatrixInputs(column_factor=factor)
        made = quantize_matrix(scheme, "bf16", {"weight": weight}, matrix, ReferenceQuantizer(), 1)
        rounded = dequantize_rows(*quantize_int8_rows(inputs / factor))
        return float((rounded @ dequantize("w8a8", made.parts).T - inputs @ weight.float().T).norm())

    smooth = smoothing_factors(inputs.abs().amax(0), 0.5)
    assert error(smooth) < at_most * error(torch.ones(512))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SingleProcessModel]:
    """Of "plain" and "smoothed", by random statistics that know some channels as eight times as large."""
    folder = tmp_path_factory.mktemp("smoothing")
    plain = write_plain(folder / "plain")
    checkpoint = Checkpoint(plain)
    config = ModelConfig.from_dict(checkpoint.config)
    plan = StatisticsPlan.of(checkpoint, config, [range(config.n_routed_experts)], "bf16", 0)
    statistics = Statistics.open(write_statistics(folder / "statistics", plan, 12))
    write_smoothed(folder / "smoothed", plain, Calibrated(statistics, 1.0))
    kernels = select_kernels("cpu", 1)
    return lambda name: SingleProcessModel.load(folder / name, "auto", kernels, 64)


def test_a_smoothed_model_gives_the_same_logits_bit_for_bit(models: Callable[[str], SingleProcessModel]) -> None:
    tokens = torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    plain, smoothed = models("plain"), models("smoothed")
    routed: dict[str, list[Tensor]] = {}
    for name, model in (("plain", plain), ("smoothed", smoothed)):
        gate = model._stages.gate

        def watched(layer: int, hidden: Tensor, gate=gate, ids=routed.setdefault(name, [])):
            routing = gate(layer, hidden)
            ids.append(routing.ids)
            return routing

        model._stages.gate = watched
    logits = plain.prefill(tokens)
    assert torch.equal(logits, smoothed.prefill(tokens))
    assert len(routed["plain"]) == 2
    assert all(torch.equal(one, other) for one, other in zip(routed["plain"], routed["smoothed"], strict=True))
    assert float(logits.std()) > 0.1


def test_smoothing_did_change_every_kind_of_tensor(models: Callable[[str], SingleProcessModel]) -> None:
    """Otherwise the test above would say nothing."""
    plain, smoothed = (models(name)._stages.weights.layers[1] for name in ("plain", "smoothed"))
    assert not torch.equal(plain.post_norm, smoothed.post_norm)
    assert not torch.equal(plain.mlp.gate, smoothed.mlp.gate)
    assert not torch.equal(plain.mlp.shared.gate_up, smoothed.mlp.shared.gate_up)
    assert torch.equal(plain.mlp.shared.down, smoothed.mlp.shared.down)
    assert torch.equal(plain.attention.output, smoothed.attention.output)
    for one, other in zip(plain.mlp.experts.blocks, smoothed.mlp.experts.blocks, strict=True):
        assert not torch.equal(one.gate_up.values, other.gate_up.values)
        assert not torch.equal(one.down.values, other.down.values)
