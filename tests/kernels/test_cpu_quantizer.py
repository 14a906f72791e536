"""The C++ quantizer gives the reference's bits, in every instruction-set variant, at odd sizes, for any threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weight_cases import folding_case, heavy_tails, importance_of, odd_weight

from flyray.kernels import formats
from flyray.kernels.cpu.library import LibraryError
from flyray.kernels.cpu.quantizer import CpuQuantizer
from flyray.kernels.quantizer import Folded
from flyray.kernels.reference_quantizer import ReferenceQuantizer

SOME = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
REFERENCE = ReferenceQuantizer()


def assert_same(actual: Folded, expected: Folded) -> None:
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(actual, name), tensor), name


@SOME
@given(st.integers(1, 6), st.integers(1, 80), st.booleans(), SEEDS)
def test_fold(cpu_quantizer: CpuQuantizer, rows: int, groups: int, bfloat: bool, seed: int) -> None:
    values, scale = folding_case(rows, groups, bfloat, seed)
    packed = formats.pack_native(values)
    assert_same(cpu_quantizer.fold(packed, scale), REFERENCE.fold(packed, scale))


@SOME
@given(st.integers(1, 5), st.integers(1, 1300), st.sampled_from((4, 8)), st.booleans(), st.booleans(), SEEDS)
def test_rows(
    cpu_quantizer: CpuQuantizer, rows: int, columns: int, bits: int, weighted: bool, clip: bool, seed: int
) -> None:
    weight = odd_weight(rows, columns, seed)
    importance = importance_of(columns, seed) if weighted else None
    scale = REFERENCE.row_scales(weight, bits, importance, clip)
    assert torch.equal(cpu_quantizer.row_scales(weight, bits, importance, clip), scale)
    assert torch.equal(cpu_quantizer.round_rows(weight, scale, bits), REFERENCE.round_rows(weight, scale, bits))


@SOME
@given(st.integers(1, 5), st.integers(1, 40), st.booleans(), st.booleans(), SEEDS)
def test_groups(cpu_quantizer: CpuQuantizer, rows: int, groups: int, weighted: bool, clip: bool, seed: int) -> None:
    weight = odd_weight(rows, 32 * groups, seed)
    importance = importance_of(32 * groups, seed) if weighted else None
    scale = REFERENCE.group_scales(weight, importance, clip)
    assert torch.equal(cpu_quantizer.group_scales(weight, importance, clip), scale)
    assert torch.equal(cpu_quantizer.round_groups(weight, scale), REFERENCE.round_groups(weight, scale))


def everything(quantizer: CpuQuantizer, packed: Tensor, scale: Tensor, weight: Tensor) -> list[Tensor]:
    folded = quantizer.fold(packed, scale)
    importance = importance_of(weight.shape[1], 7)
    rows, groups = quantizer.row_scales(weight, 4, importance, True), quantizer.group_scales(weight, None, True)
    return [
        *vars(folded).values(),
        rows,
        groups,
        quantizer.group_scales(weight, importance, True),
        quantizer.row_scales(weight, 8, None, True),
        quantizer.round_rows(weight, rows, 4),
        quantizer.round_groups(weight, groups),
    ]


def test_threads_chunks_and_strides_do_not_change_a_row(cpu_quantizer: CpuQuantizer) -> None:
    values, scale = folding_case(300, 33, True, 5)
    packed, weight = formats.pack_native(values), heavy_tails(300, 33 * 32, 6)
    three = CpuQuantizer(3, cpu_quantizer.variant)
    expected = everything(three, packed, scale, weight)
    pieces = [slice(0, 1), slice(1, 70), slice(70, 300)]
    parts = [everything(cpu_quantizer, packed[p], scale[p], weight[p]) for p in pieces]
    for whole, *split in zip(expected, *parts, strict=True):
        assert torch.equal(torch.cat(split), whole)
    strided = everything(cpu_quantizer, packed.T.contiguous().T, scale.T.contiguous().T, weight.T.contiguous().T)
    for whole, other in zip(expected, strided, strict=True):
        assert torch.equal(other, whole)
    three.close()


def test_the_first_bad_place_is_named_whichever_thread_finds_it() -> None:
    three = CpuQuantizer(3)
    weight = torch.ones(4000, 256)
    weight[17:, 5] = torch.nan
    values, scale = torch.ones(4000, 256, dtype=torch.int8), torch.ones(4000, 8)
    scale[23:, 4:] = 0.0
    for _ in range(20):
        with pytest.raises(ValueError, match="row 17, column 5"):
            three.row_scales(weight, 8, None, False)
        with pytest.raises(ValueError, match="row 17, column 5"):
            three.round_rows(weight, torch.ones(4000), 8)
        with pytest.raises(ValueError, match="row 23, group 4"):
            three.fold(formats.pack_native(values), scale)
    three.close()


def test_refuses_after_closing() -> None:
    quantizer = CpuQuantizer(1)
    quantizer.close()
    with pytest.raises(LibraryError, match="closed"):
        quantizer.row_scales(torch.ones(1, 8), 8, None, False)
