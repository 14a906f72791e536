"""Packing is checked against NumPy written from the format's definition, folding against an exact search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flyray.kernels import formats
from flyray.kernels.formats import FoldedScales

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def int4(rows: tuple[int, int] = (0, 5), groups: tuple[int, int] = (1, 4), multiple: int = 32) -> st.SearchStrategy:
    """INT4 matrices [N, K] int8 with K a multiple of `multiple`."""
    shape = st.tuples(st.integers(*rows), st.integers(*groups).map(lambda g: g * multiple))
    return shape.flatmap(lambda s: hnp.arrays(np.int8, s, elements=st.integers(-8, 7)))


def scales(shape: tuple[int, ...]) -> st.SearchStrategy:
    """Positive bfloat16 group scales over many orders of magnitude."""
    return hnp.arrays(np.float32, shape, elements=st.floats(2.0**-100, 2.0**60, width=32)).map(
        lambda a: torch.from_numpy(a).to(torch.bfloat16)
    )


def oracle_words(values: np.ndarray, order: tuple[int, ...], offset: int) -> np.ndarray:
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.int64)
    for nibble, column in enumerate(order):
        words |= ((values[:, column::8].astype(np.int64) + offset) & 15) << (4 * nibble)
    return words.astype(np.uint32).view(np.int32)


def native_weight(law: str, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    draw = {"gauss": generator.standard_normal, "t5": lambda size: generator.standard_t(5, size)}[law]
    return formats.quantize_native(torch.from_numpy(draw((rows, columns))).float() * 0.02)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def best_error(values: torch.Tensor, group_scale: torch.Tensor) -> float:
    """The least squared error over all row scales, exactly: every change of a multiplier is visited in order."""
    energy = values.double().unflatten(1, (-1, 32)).square().sum(-1)
    target = group_scale.double()
    steps = torch.arange(1, 15, dtype=torch.float64)
    breaks = (target[..., None] / (steps + 0.5)).flatten(1)
    order = breaks.argsort(1, descending=True)
    d_cross = (energy * target)[..., None].expand(-1, -1, 14).flatten(1).gather(1, order)
    d_square = (energy[..., None] * (2 * steps + 1)).flatten(1).gather(1, order)
    cross = torch.cat(((energy * target).sum(1, keepdim=True), d_cross), 1).cumsum(1)
    square = torch.cat((energy.sum(1, keepdim=True), d_square), 1).cumsum(1)
    total = (energy * target**2).sum()
    return float(((total - (cross**2 / square).amax(1).sum()).clamp(min=0) / total).sqrt())


@given(int4(multiple=8))
def test_native_words_follow_the_definition(values: np.ndarray) -> None:
    packed = formats.pack_native(torch.from_numpy(values))
    assert np.array_equal(packed.numpy(), oracle_words(values, tuple(range(8)), 8))
    assert np.array_equal(formats.unpack_native(packed).numpy(), values)


@given(int4(multiple=8))
def test_awq_words_follow_the_definition(values: np.ndarray) -> None:
    packed = formats.pack_awq(torch.from_numpy(values))
    assert np.array_equal(packed.numpy(), oracle_words(values, AWQ, 0))
    assert np.array_equal(formats.unpack_awq(packed).numpy(), values)


@given(hnp.arrays(np.int32, (3, 4), elements=st.integers(-(2**31), 2**31 - 1)))
def test_any_word_survives_unpacking_and_packing(words: np.ndarray) -> None:
    packed = torch.from_numpy(words)
    assert torch.equal(formats.pack_native(formats.unpack_native(packed)), packed)
    assert torch.equal(formats.pack_awq(formats.unpack_awq(packed)), packed)


@given(int4(rows=(1, 5)))
def test_split_nibbles_puts_columns_j_and_j_plus_16_in_a_byte(values: np.ndarray) -> None:
    split = formats.split_nibbles(torch.from_numpy(values))
    groups = values.reshape(values.shape[0], -1, 2, 16).astype(np.int16) + 8
    oracle = (groups[:, :, 0] | (groups[:, :, 1] << 4)).astype(np.uint8).reshape(values.shape[0], -1)
    assert np.array_equal(split.numpy(), oracle)
    assert np.array_equal(formats.join_nibbles(split).numpy(), values)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 4), st.sampled_from([2, 4, 10])), elements=st.integers(1, 15)))
def test_multipliers_round_trip_two_a_byte(multipliers: np.ndarray) -> None:
    packed = formats.pack_multipliers(torch.from_numpy(multipliers))
    assert np.array_equal(packed.numpy(), multipliers[:, 0::2] + 16 * multipliers[:, 1::2])
    assert np.array_equal(formats.unpack_multipliers(packed).numpy(), multipliers)


def test_every_nibble_times_every_multiplier_is_exact_and_fits_int8() -> None:
    """All 16 values by all 15 multipliers, also by the packed-byte formula that kernels use."""
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(15, 2)
    multipliers = torch.arange(1, 16, dtype=torch.uint8).unsqueeze(1)
    products = formats.multiply_out(values, multipliers)
    exact = values.int() * multipliers.int()
    assert torch.equal(products.int(), exact)
    assert int(exact.abs().max()) == 120
    nibbles = values.int() + 8
    by_bytes = ((nibbles * multipliers.int() + 128 - 8 * multipliers.int()) ^ 0x80) & 0xFF
    assert torch.equal(by_bytes.to(torch.uint8).view(torch.int8), products)


@given(st.data())
@settings(max_examples=60)
def test_folding_bounds_and_error(data: st.DataObject) -> None:
    values = torch.from_numpy(data.draw(int4(rows=(1, 4))))
    group_scale = data.draw(scales((values.shape[0], values.shape[1] // 32)))
    folded = formats.fold_scales(values, group_scale)
    assert int(folded.multipliers.min()) >= 1
    assert int(folded.multipliers.max()) <= 15
    assert int(formats.multiply_out(values, folded.multipliers).int().abs().max()) <= 120
    want = formats.dequantize_groups(values, group_scale)
    got = formats.dequantize_folded(values, folded)
    for row in range(values.shape[0]):
        if bool(want[row].any()):
            best = best_error(values[row : row + 1], group_scale[row : row + 1])
            assert relative_error(got[row], want[row]) <= 1.15 * best + 1e-3


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_a_row_folds_the_same_alone_and_among_others(row: int, seed: int) -> None:
    values, group_scale = native_weight("gauss", 7, 256, seed)
    together = formats.fold_scales(values, group_scale)
    alone = formats.fold_scales(values[row : row + 1], group_scale[row : row + 1])
    assert torch.equal(alone.multipliers[0], together.multipliers[row])
    assert torch.equal(alone.scale[0], together.scale[row])


def test_folding_in_chunks_is_folding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values, group_scale = native_weight("t5", 50, 128)
    whole = formats.fold_scales(values, group_scale)
    monkeypatch.setattr(formats, "_GROUPS_A_CHUNK", 12)
    chunked = formats.fold_scales(values, group_scale)
    assert torch.equal(chunked.multipliers, whole.multipliers)
    assert torch.equal(chunked.scale, whole.scale)


@pytest.mark.parametrize(("law", "bound"), [("gauss", 0.033), ("t5", 0.071)])
def test_fold_error_at_the_model_s_width(law: str, bound: float) -> None:
    values, group_scale = native_weight(law, 256, 7168)
    folded = formats.fold_scales(values, group_scale)
    want = formats.dequantize_groups(values, group_scale)
    error = relative_error(formats.dequantize_folded(values, folded), want)
    assert error <= bound
    assert error <= 1.01 * best_error(values, group_scale)


def test_integer_ratios_fold_without_loss() -> None:
    values, _ = native_weight("gauss", 8, 96)
    group_scale = torch.tensor([[15.0, 7.0, 2.0]]).expand(8, 3) * 0.0078125
    folded = formats.fold_scales(values, group_scale)
    want = formats.dequantize_groups(values, group_scale)
    assert relative_error(formats.dequantize_folded(values, folded), want) < 1e-6


def test_rows_and_groups_of_zeros_fold() -> None:
    values, group_scale = native_weight("gauss", 3, 96)
    values[0] = 0
    values[1, 32:64] = 0
    group_scale[0] = torch.tensor([0.0, -1.0, 3.0])
    group_scale[1, 1] = 1e6  # the scale of a group of zeros must not spoil its row
    folded = formats.fold_scales(values, group_scale)
    assert folded.scale[0] == 0
    assert folded.multipliers[0].tolist() == [1, 1, 1]
    assert folded.multipliers[1, 1] == 1
    want = formats.dequantize_groups(values, group_scale)
    assert relative_error(formats.dequantize_folded(values, folded)[1], want[1]) < 0.02


@pytest.mark.parametrize("bad", [0.0, -0.5, float("nan"), float("inf")])
def test_scales_that_no_multiplier_expresses_are_refused(bad: float) -> None:
    values, group_scale = native_weight("gauss", 4, 96)
    group_scale[2, 1] = bad
    with pytest.raises(ValueError, match="row 2, group 1"):
        formats.fold_scales(values, group_scale)


def test_native_rounding_is_idempotent() -> None:
    """Weights that came out of a native checkpoint are found again: absmax / 7 loses nothing on them."""
    values, group_scale = native_weight("gauss", 64, 256)
    weight = formats.dequantize_native(formats.pack_native(values), group_scale)
    again, scale_again = formats.quantize_native(weight)
    assert relative_error(formats.dequantize_groups(again, scale_again), weight) < 4e-3
    exact_values, exact_scale = formats.quantize_native(formats.dequantize_groups(values, group_scale))
    assert torch.equal(exact_values, values)
    assert torch.equal(exact_scale, group_scale)


def test_dequantize_native_rounds_the_exact_product_once() -> None:
    values, group_scale = native_weight("gauss", 4, 64)
    exact = values.numpy().reshape(4, 2, 32).astype(np.float64) * group_scale.double().numpy()[..., None]
    want = torch.from_numpy(exact.reshape(4, 64)).to(torch.bfloat16)
    assert torch.equal(formats.dequantize_native(formats.pack_native(values), group_scale), want)


@given(hnp.arrays(np.float32, (4, 16), elements=st.floats(-1e4, 1e4, width=32)))
def test_int8_rows_are_the_nearest_integers(weight: np.ndarray) -> None:
    values, scale = formats.quantize_int8_rows(torch.from_numpy(weight))
    assert int(values.int().abs().max()) <= 127
    assert torch.equal(scale, torch.from_numpy(np.abs(weight).max(1) / np.float32(127)))
    error = (formats.dequantize_rows(values, scale) - torch.from_numpy(weight)).abs()
    assert bool((error <= scale.unsqueeze(1) * 0.5001 + 1e-30).all())


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="12 columns are not a multiple of 8"):
        formats.pack_native(torch.zeros(2, 12, dtype=torch.int8))
    with pytest.raises(ValueError, match="40 columns are not a multiple of 32"):
        formats.split_nibbles(torch.zeros(2, 40, dtype=torch.int8))
    with pytest.raises(ValueError, match="40 columns are not a multiple of 32"):
        formats.quantize_native(torch.zeros(2, 40))
    with pytest.raises(ValueError, match="3 columns are not a multiple of 2"):
        formats.pack_multipliers(torch.ones(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected one a group of 32: \[2, 2\]"):
        formats.fold_scales(torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"expected one a row: \[2\]"):
        formats.dequantize_rows(torch.zeros(2, 4, dtype=torch.int8), torch.ones(3))


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"-8\.\.7"):
        formats.pack_native(torch.full((1, 8), 8, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"1\.\.15"):
        formats.pack_multipliers(torch.tensor([[0, 3]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="hold a 0"):
        formats.unpack_multipliers(torch.tensor([[0x30]], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"1\.\.15"):
        formats.dequantize_folded(
            torch.zeros(1, 32, dtype=torch.int8),
            FoldedScales(torch.tensor([[16]], dtype=torch.uint8), torch.ones(1)),
        )
    with pytest.raises(ValueError, match="not finite"):
        formats.quantize_int8_rows(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match=r"must be torch\.int32"):
        formats.unpack_native(torch.zeros(2, 4, dtype=torch.int8))
