"""The C++ converter gives the bits of the steps that it does at once, in every variant, at odd sizes."""

from __future__ import annotations

import pytest
import torch
from cpu_variants import CPU_VARIANTS, open_cpu_converter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weight_cases import folding_case, odd_weight

from flyray.kernels import formats
from flyray.kernels.cpu.converter import CpuConverter
from flyray.kernels.protocol import Int4Weight, Int8Weight
from flyray.kernels.reference_quantizer import ReferenceQuantizer

SOME = settings(max_examples=20, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
REFERENCE = ReferenceQuantizer()


@pytest.fixture(scope="module", params=CPU_VARIANTS)
def converter(request: pytest.FixtureRequest) -> CpuConverter:
    return open_cpu_converter(request.param, 1)


def int8(rows: int, columns: int) -> Int8Weight:
    return Int8Weight(torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows))


def int4(rows: int, columns: int) -> Int4Weight:
    nibbles, multipliers = torch.empty(rows, columns // 2), torch.empty(rows, columns // 32)
    return Int4Weight(nibbles.to(torch.uint8), multipliers.to(torch.uint8), torch.empty(rows))


def same(found: Int4Weight | Int8Weight, *expected: Tensor) -> None:
    for tensor, wanted in zip(vars(found).values(), expected, strict=True):
        assert torch.equal(tensor, wanted)


@SOME
@given(st.integers(1, 6), st.integers(1, 40), st.booleans(), SEEDS)
def test_native(converter: CpuConverter, rows: int, groups: int, bfloat: bool, seed: int) -> None:
    values, scale = folding_case(rows, groups, bfloat, seed)
    packed, narrow, wide = formats.pack_native(values), int4(rows, 32 * groups), int8(rows, 32 * groups)
    converter.native(packed, scale, narrow)
    folded = REFERENCE.fold(packed, scale)
    same(narrow, formats.split_nibbles(values), folded.multipliers, folded.scale)
    weight = formats.dequantize_native(packed, scale, torch.float32)
    if bool(weight.isfinite().all()):
        converter.native(packed, scale, wide)
        same(wide, *formats.quantize_int8_rows(weight))


@SOME
@given(st.integers(1, 6), st.integers(1, 20), SEEDS)
def test_folded(converter: CpuConverter, rows: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (rows, 64 * pairs), generator=generator, dtype=torch.int8)
    multipliers = torch.randint(1, 16, (rows, 2 * pairs), generator=generator, dtype=torch.uint8)
    target = int4(rows, 64 * pairs)
    converter.folded(formats.pack_native(values), formats.pack_multipliers(multipliers), target)
    assert torch.equal(target.nibbles, formats.split_nibbles(values))
    assert torch.equal(target.multipliers, multipliers)


@SOME
@given(st.integers(1, 5), st.integers(1, 300), st.booleans(), SEEDS)
def test_floats_to_int8(converter: CpuConverter, rows: int, columns: int, bfloat: bool, seed: int) -> None:
    weight, target = odd_weight(rows, columns, seed), int8(rows, columns)
    weight = weight.clamp(-3e38, 3e38).bfloat16() if bfloat else weight
    converter.floats(weight, target)
    same(target, *formats.quantize_int8_rows(weight))


@SOME
@given(st.integers(1, 5), st.integers(1, 20), st.booleans(), SEEDS)
def test_floats_to_int4(converter: CpuConverter, rows: int, groups: int, bfloat: bool, seed: int) -> None:
    weight, target = odd_weight(rows, 32 * groups, seed), int4(rows, 32 * groups)
    weight = weight.bfloat16() if bfloat else weight
    converter.floats(weight, target)
    wanted = REFERENCE.group_scales(weight.float(), None, False)
    folded = REFERENCE.fold(formats.pack_native(REFERENCE.round_groups(weight.float(), wanted)), wanted)
    values = REFERENCE.round_groups(weight.float(), folded.multipliers.float() * folded.scale[:, None])
    same(target, formats.split_nibbles(values), folded.multipliers, folded.scale)


def test_threads_and_parts_do_not_change_a_row(converter: CpuConverter) -> None:
    weight, whole = odd_weight(700, 416, 3).bfloat16(), int4(700, 416)
    CpuConverter(3).floats(weight, whole)
    parts = int4(700, 416)
    for rows in (slice(0, 1), slice(1, 300), slice(300, 700)):
        converter.floats(weight[rows], Int4Weight(*(part[rows] for part in vars(parts).values())))
    same(parts, *vars(whole).values())


def test_what_does_not_fit_is_named() -> None:
    one = CpuConverter(2)
    values, scale = torch.ones(3000, 64, dtype=torch.int8), torch.ones(3000, 2)
    packed = formats.pack_native(values)
    scale[2100:, 1] = torch.inf
    with pytest.raises(ValueError, match="row 2100, group 1 is inf"):
        one.native(packed, scale, int4(3000, 64))
    with pytest.raises(ValueError, match="weight of row 2100, column 32 is inf"):
        one.native(packed, scale, int8(3000, 64))
    with pytest.raises(ValueError, match="multipliers of row 5 hold a 0"):
        one.folded(packed[:6], torch.tensor([[1 + 16]] * 5 + [[1]], dtype=torch.uint8), int4(6, 64))
    with pytest.raises(ValueError, match="weight of row 9, column 1 is nan"):
        one.floats(torch.tensor([[1.0, torch.nan]]), int8(1, 2), 9)
    with pytest.raises(ValueError, match="weight has 40 columns, not a multiple of 32"):
        one.floats(torch.ones(2, 40), int4(2, 40))
    with pytest.raises(ValueError, match=r"weight is float16 \[2, 32\]"):
        one.floats(torch.ones(2, 32).half(), int8(2, 32))
    with pytest.raises(ValueError, match=r"multipliers are uint8 \[6, 2\], expected uint8 \[6, 1\]"):
        one.folded(packed[:6], torch.ones(6, 2, dtype=torch.uint8), int4(6, 64))
    with pytest.raises(ValueError, match=r"target's values is int8 \[3, 32\] on cpu, expected int8 \[2, 32\]"):
        one.floats(torch.ones(2, 32), int8(3, 32))
    with pytest.raises(ValueError, match="contiguous on the CPU"):
        one.floats(torch.ones(2, 32), Int8Weight(torch.ones(32, 2, dtype=torch.int8).T, torch.ones(2)))
