"""What is computed of compiled FlyDSL products: how many blocks routing fills, and what bounds a product."""

from __future__ import annotations

from collections import Counter

import pytest

from flyray.kernels.flydsl.build import KIMI
from flyray.kernels.flydsl.estimate import routed, times
from flyray.kernels.flydsl.isa import Isa

XCDS = 8


def test_blocks_of_uniform_routing() -> None:
    assert routed(1, 384, 4) == pytest.approx((8, 8))
    assert routed(1, 48, 4) == pytest.approx((1, 1))
    distinct, blocks = routed(2048, 384, 16)
    assert distinct == pytest.approx(384)
    assert 2048 * 8 / 16 < blocks < 2048 * 8 / 16 + 384
    # With blocks of one pair every pair is a block.
    assert routed(16384, 384, 1)[1] == pytest.approx(16384 * 8)


def test_what_bounds_a_product() -> None:
    shape = next(each for each in KIMI if each.name == "w4_gate_up_t16_k7168")
    loop = Counter({"v_xor_b32_e32": 484, "v_mfma_i32_16x16x32_i8": 64, "ds_read_b128": 16, "ds_write_b128": 4})
    isa = Isa(vgpr=120, sgpr=45, spills=0, parked=0, scratch=0, lds=0, lines=(), loop=loop)
    few, many = times(shape, isa, 1, 48), times(shape, isa, 16384, 384)
    assert few.bytes == pytest.approx(4096 * 7168 * 4.125 / 8 / 6e12 * 1e6)
    # One expert has 32 programs; their waves are each the only one of its SIMD.
    assert few.issue == pytest.approx(7 * (484 + 64) * 4 / 2100)
    assert (few.bound, few.longest) == ("issue", few.issue)
    assert many.bound == "issue"
    assert many.bytes == pytest.approx(few.bytes * 384)


def test_blocks_of_an_expert_meet_in_one_cache() -> None:
    """Programs go to the XCDs in turns, a block's after the other's."""
    assert all(shape.programs % XCDS == 0 for shape in KIMI)
