"""The FlyDSL products of Kimi-K2.5 compile for gfx942: no spills, no scratch, half of the LDS, the INT8 matrix unit.

Compiled alone: no such GPU is here to run them. Their arithmetic is executed in test_flydsl_arithmetic.py.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from importlib.util import find_spec

import pytest

from flyray.kernels.flydsl.build import KIMI, LINKERS, BuildError, build
from flyray.kernels.flydsl.cycles import loop_clocks
from flyray.kernels.flydsl.isa import LDS_BYTES, read_isa
from flyray.kernels.flydsl.shape import ProductShape

BUILT = {shape.name: shape for shape in KIMI}
TEXT = """
.LBB0_1:
	v_add_u32_e32 v1, v1, v2
	s_cbranch_scc1 .LBB0_1
.LBB0_2:
	v_xor_b32_e32 v1, 1, v2
	v_mfma_i32_16x16x32_i8 v[0:3], v[4:5], v[6:7], v[0:3]
	s_cbranch_scc0 .LBB0_2
	s_cbranch_scc1 .LBB0_3
.LBB0_3:
    .agpr_count:     4
    .group_segment_fixed_size: 64
    .private_segment_fixed_size: 0
    .sgpr_count:     12
    .sgpr_spill_count: 1
    .vgpr_count:     100
    .vgpr_spill_count: 2
"""

compiled = pytest.mark.skipif(
    find_spec("flydsl") is None or ("ROCM_PATH" not in os.environ and not any(map(shutil.which, LINKERS))),
    reason="needs FlyDSL and a linker for gfx942 (Debian: lld-19)",
)


@compiled
@pytest.mark.parametrize(
    ("name", "waves", "under_way"),
    [
        ("w4_gate_up_t4_k7168", 5, 10),
        ("w4_gate_up_t16_k7168", 4, 8),
        ("w4_down_t128_k2048", 2, 2),
        ("w8_gate_up_t64_k7168", 2, 4),
    ],
)
def test_gfx942_flydsl(name: str, waves: int, under_way: int) -> None:
    shape = BUILT[name]
    isa = build(shape, "gfx942")
    assert isa.spills == 0
    assert isa.scratch == 0
    assert isa.lds + shape.lds_bytes <= LDS_BYTES // 2
    assert isa.waves >= waves
    assert isa.loop["v_mfma_i32_16x16x32_i8"] == isa.matrix > 0
    # Weights of the next run of the loop are on their way while it waits for activations, and no register is copied.
    assert isa.under_way >= under_way
    assert isa.loop["v_mov_b64_e32"] == 0
    assert isa.loop["s_barrier"] == (shape.turns if shape.split == 1 else 0)
    if shape.bits == 4:
        # A word of 8 nibbles takes two `and`, a shift, two multiply-adds and two `xor`.
        words = isa.matrix // shape.token_tiles
        assert isa.loop["v_xor_b32_e32"] == 2 * words
        assert isa.vector <= 8 * words
    clocks = loop_clocks(isa.lines, "gfx942")
    assert clocks is None or 16 * isa.matrix < clocks < 80 * isa.matrix


def test_assembly_is_read() -> None:
    isa = read_isa(TEXT)
    assert (isa.vgpr, isa.sgpr, isa.spills, isa.scratch, isa.lds, isa.waves) == (104, 12, 3, 0, 64, 4)
    assert (isa.matrix, isa.vector) == (1, 1)
    assert isa.loop == Counter(["v_xor_b32_e32", "v_mfma_i32_16x16x32_i8"])
    unrolled = read_isa(TEXT.replace("s_cbranch_scc0 .LBB0_2", "s_nop 0"))
    assert (unrolled.matrix, unrolled.vector) == (1, 2)
    with pytest.raises(ValueError, match="the assembly's metadata has no 'sgpr_count'"):
        read_isa(TEXT.replace(".sgpr_count", ".other"))


@compiled
def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(BuildError, match=r"w4_down_t48_k64 for gfx942: .*KeyError: 48"):
        build(ProductShape(4, 64, 64, 4, False, 48), "gfx942")
