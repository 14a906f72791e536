"""Weight quantizers against NumPy written from the definitions, and against what a search must never do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weight_cases import folding_case, heavy_tails, importance_of, odd_weight

from flyray.kernels import formats
from flyray.kernels.quantizer import WeightQuantizer
from flyray.kernels.select import select_quantizer

SOME = settings(max_examples=20, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
CLIPS = np.linspace(1.0, 0.06, 48)


def errors_by_clip(row: np.ndarray, limit: int, importance: np.ndarray) -> np.ndarray:
    """The weighted squared error of one row or group at every clip, in float64."""
    row, importance = row.astype(np.float64), importance.astype(np.float64)
    largest = np.abs(row).max()
    errors = []
    for clip in CLIPS:
        scale = largest * clip / limit
        rounded = np.clip(np.rint(row / scale), -limit, limit)
        errors.append(np.sum(importance * (row - rounded * scale) ** 2))
    return np.array(errors)


def check_search(row: np.ndarray, scale: float, limit: int, importance: np.ndarray) -> None:
    """The scale is a candidate, and its error the least up to float32's rounding of the sums."""
    largest = np.abs(row.astype(np.float64)).max()
    if largest == 0:
        assert scale == 0
        return
    chosen = int(np.argmin(np.abs(CLIPS - scale * limit / largest)))
    assert scale == pytest.approx(largest * CLIPS[chosen] / limit, rel=1e-6)
    errors = errors_by_clip(row, limit, importance)
    noise = 1e-9 * errors.max()
    assert errors[chosen] <= errors.min() * (1 + 1e-4) + noise
    assert errors[chosen] <= errors[0] * (1 + 1e-4) + noise


@SOME
@given(st.integers(1, 5), st.integers(1, 200), st.sampled_from((4, 8)), st.booleans(), SEEDS)
def test_row_search_against_brute_force(
    quantizer: WeightQuantizer, rows: int, columns: int, bits: int, weighted: bool, seed: int
) -> None:
    weight = heavy_tails(rows, columns, seed)
    importance = importance_of(columns, seed) if weighted else None
    scale = quantizer.row_scales(weight, bits, importance, True)
    shared = np.ones(columns) if importance is None else importance.numpy()
    for row in range(rows):
        check_search(weight[row].numpy(), float(scale[row]), 2 ** (bits - 1) - 1, shared)


@SOME
@given(st.integers(1, 3), st.integers(1, 20), st.booleans(), SEEDS)
def test_group_search_against_brute_force(
    quantizer: WeightQuantizer, rows: int, groups: int, weighted: bool, seed: int
) -> None:
    weight = heavy_tails(rows, 32 * groups, seed)
    importance = importance_of(32 * groups, seed) if weighted else None
    scale = quantizer.group_scales(weight, importance, True)
    shared = np.ones(32 * groups) if importance is None else importance.numpy()
    assert scale.shape == (rows, groups)
    for row in range(rows):
        for group in range(groups):
            columns = slice(32 * group, 32 * group + 32)
            check_search(weight[row, columns].numpy(), float(scale[row, group]), 7, shared[columns])


@SOME
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from((4, 8)), SEEDS)
def test_without_clipping_scales_are_absmax_over_limit(
    quantizer: WeightQuantizer, rows: int, groups: int, bits: int, seed: int
) -> None:
    weight = odd_weight(rows, 32 * groups, seed)
    importance = importance_of(32 * groups, seed)
    limit = np.float32(2 ** (bits - 1) - 1)
    expected = np.abs(weight.numpy()).max(axis=1) / limit
    assert np.array_equal(quantizer.row_scales(weight, bits, importance, False).numpy(), expected)
    grouped = np.abs(weight.numpy()).reshape(rows, groups, 32).max(axis=2) / np.float32(7)
    assert np.array_equal(quantizer.group_scales(weight, importance, False).numpy(), grouped)


@SOME
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from((4, 8)), SEEDS)
def test_rounding_follows_numpy(quantizer: WeightQuantizer, rows: int, groups: int, bits: int, seed: int) -> None:
    weight = odd_weight(rows, 32 * groups, seed)
    low, high = (-8, 7) if bits == 4 else (-127, 127)

    def oracle(scale: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            ratio = weight.numpy() / scale
        return np.where(scale > 0, np.clip(np.rint(ratio), low, high), 0).astype(np.int8)

    scale = quantizer.row_scales(weight, bits, None, True)
    assert np.array_equal(quantizer.round_rows(weight, scale, bits).numpy(), oracle(scale.numpy()[:, None]))
    if bits == 4:
        scale = quantizer.group_scales(weight, None, True)
        values = quantizer.round_groups(weight, scale)
        assert np.array_equal(values.numpy(), oracle(scale.numpy().repeat(32, axis=1)))


def test_rounding_is_half_to_even_and_keeps_the_lowest_integer(quantizer: WeightQuantizer) -> None:
    row = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.5, -7.6, -9.0, 200.0, -200.0]])
    one = torch.ones(1)
    assert quantizer.round_rows(row, one, 4).tolist() == [[0, 2, 2, 0, -2, 7, -8, -8, 7, -8]]
    assert quantizer.round_rows(row, one, 8).tolist() == [[0, 2, 2, 0, -2, 8, -8, -9, 127, -127]]
    wide = torch.nn.functional.pad(row, (0, 22))
    assert quantizer.round_groups(wide, one[:, None])[0, :10].tolist() == [0, 2, 2, 0, -2, 7, -8, -8, 7, -8]


@pytest.mark.parametrize(("heavy", "bits", "gain"), [(False, 4, 0.75), (True, 4, 0.75), (False, 8, 0.998)])
def test_clipping_lowers_the_error_of_wide_rows(
    quantizer: WeightQuantizer, heavy: bool, bits: int, gain: float
) -> None:
    weight = heavy_tails(16, 2048, 3)[0 if heavy else 1 :: 2]

    def error(clip: bool) -> Tensor:
        scale = quantizer.row_scales(weight, bits, None, clip)
        values = quantizer.round_rows(weight, scale, bits)
        return (formats.dequantize_rows(values, scale) - weight).norm(dim=1)

    assert float((error(True) / error(False)).mean()) <= gain


def test_importance_decides_what_is_clipped(quantizer: WeightQuantizer) -> None:
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    weight[0, 5] = 9.0
    important, unimportant = torch.ones(64), torch.ones(64)
    important[5], unimportant[5] = 1e6, 0.0
    kept = float(quantizer.row_scales(weight, 4, important, True))
    clipped = float(quantizer.row_scales(weight, 4, unimportant, True))
    # 9 is kept to within half a step or less, or costs nothing and the others get the resolution.
    assert abs(round(9.0 / kept) * kept - 9.0) < 0.05
    assert clipped < 0.4 * 9.0 / 7
    assert float(quantizer.row_scales(weight, 4, torch.zeros(64), True)) == pytest.approx(9.0 / 7)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(-120, 100), SEEDS)
def test_the_search_does_not_depend_on_magnitude(
    quantizer: WeightQuantizer, rows: int, groups: int, exponent: int, seed: int
) -> None:
    weight = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)
    weight = torch.where(weight.abs() < 2.0**-5, 2.0**-5, weight)  # so that scaling by 2^-120 stays exact
    power = 2.0**exponent
    importance = importance_of(32 * groups, seed)
    for search in (
        lambda w, i: quantizer.row_scales(w, 4, i, True),
        lambda w, i: quantizer.row_scales(w, 8, i, True),
        lambda w, i: quantizer.group_scales(w, i, True),
    ):
        expected = search(weight, importance) * power
        exact = expected.abs() >= 2.0**-126
        assert torch.equal(search(weight * power, importance)[exact], expected[exact])
        assert torch.equal(search(weight, importance * 2.0**90) * power, expected)


@SOME
@given(st.integers(1, 5), st.integers(1, 40), st.booleans(), SEEDS)
def test_fold_is_fold_scales_and_tells_its_error(
    quantizer: WeightQuantizer, rows: int, groups: int, bfloat: bool, seed: int
) -> None:
    values, group_scale = folding_case(rows, groups, bfloat, seed)
    folded = quantizer.fold(formats.pack_native(values), group_scale)
    expected = formats.fold_scales(values, group_scale)
    assert torch.equal(folded.multipliers, expected.multipliers)
    assert torch.equal(folded.scale, expected.scale)
    grouped = values.numpy().astype(np.float64).reshape(rows, groups, 32)
    wanted = grouped * group_scale.double().numpy()[:, :, None]
    got = grouped * (folded.multipliers.double() * folded.scale.double()[:, None]).numpy()[:, :, None]
    norm = (wanted**2).sum(axis=(1, 2))
    np.testing.assert_allclose(folded.norm.numpy(), norm, rtol=1e-12)
    np.testing.assert_allclose(folded.difference.numpy(), ((got - wanted) ** 2).sum(axis=(1, 2)), rtol=1e-9)


def test_fold_of_a_row_of_zeros(quantizer: WeightQuantizer) -> None:
    folded = quantizer.fold(formats.pack_native(torch.zeros(1, 96, dtype=torch.int8)), torch.tensor([[0.0, -1.0, 3.0]]))
    assert folded.multipliers.tolist() == [[1, 1, 1]]
    assert (float(folded.scale), float(folded.difference), float(folded.norm)) == (0.0, 0.0, 0.0)


WEIGHT, ONES = torch.ones(3, 64), torch.ones(64)
PACKED = torch.full((3, 8), 0x12345678, dtype=torch.int32)
SCALE = torch.ones(3, 2)


def changed(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


BAD_CALLS: dict[str, tuple[str, Callable[[WeightQuantizer], object]]] = {
    "fold zero": ("row 2, group 1 is 0.0", lambda q: q.fold(PACKED, changed(SCALE, (2, 1), 0.0))),
    "fold negative": ("row 0, group 1 is -1.0", lambda q: q.fold(PACKED, changed(SCALE, (0, 1), -1.0))),
    "fold nan": ("row 1, group 0 is nan", lambda q: q.fold(PACKED, changed(SCALE, (1, 0), torch.nan).bfloat16())),
    "fold infinite": ("row 1, group 0 is inf", lambda q: q.fold(PACKED * 0, changed(SCALE, (1, 0), torch.inf))),
    "fold first": ("row 0, group 1", lambda q: q.fold(PACKED, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))),
    "fold dtype": ("packed is uint8", lambda q: q.fold(PACKED.byte(), SCALE)),
    "fold scale dtype": ("group_scale is float16", lambda q: q.fold(PACKED, SCALE.half())),
    "fold groups": ("6 columns of 8 values", lambda q: q.fold(PACKED[:, :6], SCALE)),
    "fold nothing": ("0 columns of 8 values", lambda q: q.fold(PACKED[:, :0], SCALE[:, :0])),
    "fold scale shape": ("group_scale has shape \\[3, 1\\]", lambda q: q.fold(PACKED, SCALE[:, :1])),
    "row nan": ("row 1, column 9 is nan", lambda q: q.row_scales(changed(WEIGHT, (1, 9), torch.nan), 8, None, True)),
    "row inf": ("row 2, column 0 is -inf", lambda q: q.row_scales(changed(WEIGHT, (2, 0), -torch.inf), 4, None, False)),
    "group nan": ("row 1, column 63 is nan", lambda q: q.group_scales(changed(WEIGHT, (1, 63), torch.nan), None, True)),
    "bits": ("bits is 5", lambda q: q.row_scales(WEIGHT, 5, None, False)),
    "weight dtype": ("weight is bfloat16", lambda q: q.row_scales(WEIGHT.bfloat16(), 8, None, False)),
    "weight dims": ("weight is float32 \\[64\\]", lambda q: q.row_scales(WEIGHT[0], 8, None, False)),
    "no columns": ("no columns", lambda q: q.row_scales(WEIGHT[:, :0], 8, None, False)),
    "group columns": ("40 columns, not a multiple of 32", lambda q: q.group_scales(WEIGHT[:, :40], None, False)),
    "importance shape": ("importance has shape \\[3\\]", lambda q: q.row_scales(WEIGHT, 8, torch.ones(3), True)),
    "importance sign": ("column 7 is -1.0", lambda q: q.group_scales(WEIGHT, changed(ONES, (7,), -1.0), True)),
    "importance nan": ("column 0 is nan", lambda q: q.row_scales(WEIGHT, 8, torch.full((64,), torch.nan), True)),
    "round nan": ("row 0, column 33 is nan", lambda q: q.round_groups(changed(WEIGHT, (0, 33), torch.nan), SCALE)),
    "round columns": ("33 columns", lambda q: q.round_groups(WEIGHT[:, :33], SCALE)),
    "round scale": ("scale of row 1 is nan", lambda q: q.round_rows(WEIGHT, changed(ONES[:3], (1,), torch.nan), 8)),
    "round sign": ("scale of row 2, group 1 is -1.0", lambda q: q.round_groups(WEIGHT, changed(SCALE, (2, 1), -1.0))),
    "round scale shape": ("scale has shape \\[2\\]", lambda q: q.round_rows(WEIGHT, torch.ones(2), 8)),
    "round bits": ("bits is 16", lambda q: q.round_rows(WEIGHT, torch.ones(3), 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_refuses_naming_the_place(quantizer: WeightQuantizer, name: str) -> None:
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(quantizer)


def test_no_rows_are_fine(quantizer: WeightQuantizer) -> None:
    assert quantizer.fold(PACKED[:0], SCALE[:0]).multipliers.shape == (0, 2)
    assert quantizer.row_scales(WEIGHT[:0], 8, None, True).shape == (0,)
    assert quantizer.group_scales(WEIGHT[:0], None, True).shape == (0, 2)
    assert quantizer.round_rows(WEIGHT[:0], torch.ones(0), 4).shape == (0, 64)
    assert quantizer.round_groups(WEIGHT[:0], SCALE[:0]).shape == (0, 64)


def test_selects_by_name() -> None:
    before = torch.get_num_threads()
    try:
        assert [select_quantizer(name, 1).name for name in ("cpu", "reference")] == ["cpu", "reference"]
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="known: cpu, reference"):
        select_quantizer("cuda", 1)
    with pytest.raises(ValueError, match="threads is 0"):
        select_quantizer("cpu", 0)
