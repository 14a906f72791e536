"""The FlyDSL products of Kimi-K2.5 compile for gfx942: no spills, no scratch, half of the LDS, the INT8 matrix unit.

No such GPU is here to run them; what the compiler made of them, before it chose the GPU's instructions and registers,
is executed in NumPy and gives the reference's bits.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from llvm_machine import Machine

from flyray.kernels.flydsl.build import KIMI, LINKERS, BuildError, Code, build, compiled
from flyray.kernels.flydsl.cycles import loop_clocks
from flyray.kernels.flydsl.isa import LDS_BYTES, read_isa
from flyray.kernels.flydsl.layout import wave_matrix
from flyray.kernels.flydsl.shape import ProductShape
from flyray.kernels.ordered import ordered_silu
from flyray.kernels.protocol import Int4Matrix, Int8Matrix
from flyray.kernels.selfcheck import random_matrix

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

needs_compiler = pytest.mark.skipif(
    find_spec("flydsl") is None or ("ROCM_PATH" not in os.environ and not any(map(shutil.which, LINKERS))),
    reason="needs FlyDSL and a linker for gfx942 (Debian: lld-19)",
)


@cache
def code(name: str) -> Code:
    return compiled(BUILT[name], "gfx942")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "waves", "under_way"),
    [
        ("w4_gate_up_t4_k7168", 5, 10),
        ("w4_gate_up_t16_k7168", 4, 8),
        ("w4_down_t128_k2048", 2, 2),
        ("w8_down_t64_k2048", 4, 4),
    ],
)
def test_gfx942_flydsl(name: str, waves: int, under_way: int) -> None:
    shape, isa = BUILT[name], read_isa(code(name).assembly)
    assert isa.spills == isa.parked == 0
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


@needs_compiler
@pytest.mark.parametrize(
    "name", ["w4_gate_up_t4_k7168", "w4_gate_up_t16_k7168", "w4_down_t128_k2048", "w8_down_t64_k2048"]
)
def test_the_compiled_kernel_gives_the_references_bits(name: str) -> None:
    """Three blocks: full, with unused places, and of an unknown expert; all rows that one program multiplies."""
    shape, generator = BUILT[name], torch.Generator().manual_seed(7)
    rows, kind = shape.rows * (2 if shape.gated else 1), Int4Matrix if shape.bits == 4 else Int8Matrix
    matrix = random_matrix(kind, 2, rows, shape.inner, generator)
    assert isinstance(matrix, Int4Matrix | Int8Matrix)
    pairs = shape.tokens + 3
    tokens = 5 if shape.gated else pairs
    x = torch.randint(-127, 128, (tokens, shape.inner), generator=generator, dtype=torch.int8)
    x_scale, pair_row = torch.rand(tokens, generator=generator), torch.arange(pairs, dtype=torch.int32) * 3 % tokens
    places = torch.randperm(pairs, generator=generator).to(torch.int32)
    order = torch.cat([places, torch.full((2 * shape.tokens - 3,), pairs, dtype=torch.int32)])
    order[-2:] = 0  # of a block of an expert that is not here
    owner, out = torch.tensor([1, 0, 2], dtype=torch.int32), torch.full((pairs, shape.rows), torch.nan)
    laid = wave_matrix(matrix, shape.gated)
    tensors = [
        laid.words,
        laid.words if laid.multipliers is None else laid.multipliers,
        laid.scale,
        x.view(torch.int32),
    ]
    tensors += [x_scale, pair_row, order, owner, out]
    machine = Machine(code(name).llvm, [*(each.numpy() for each in tensors), pairs, 2, x.nbytes], shape.lds_bytes)
    column = 17 % shape.programs
    for block in range(3):
        machine.run(column, block)

    width = shape.rows // shape.programs
    own = slice(column * width, (column + 1) * width)
    expert = torch.empty(pairs, dtype=torch.long)
    expert[places.long()] = (torch.arange(pairs) < shape.tokens).long()
    source = pair_row.long() if shape.gated else torch.arange(pairs)
    halves = []
    for first in (0, shape.rows)[: 1 + shape.gated]:
        weights = integers(matrix, slice(first + own.start, first + own.stop))[expert]  # [P, width, K]
        sums = torch.einsum("pnk,pk->pn", weights.double(), x[source].double()).float()
        halves.append(sums * x_scale[source, None] * matrix.scale[expert, first + own.start : first + own.stop])
    expected = ordered_silu(halves[0]) * halves[1] if shape.gated else halves[0]
    assert torch.equal(out[:, own], expected)
    assert int(out.isnan().sum()) == pairs * (shape.rows - width)


@needs_compiler
def test_a_missing_barrier_is_found() -> None:
    shape, text = BUILT["w4_gate_up_t16_k7168"], code("w4_gate_up_t16_k7168").llvm
    text = text.replace("call void @llvm.amdgcn.s.barrier()", "call void @llvm.amdgcn.sched.barrier(i32 0)")
    sizes = {"words": 2 * shape.units * shape.tile_words, "multipliers": shape.units * shape.multiplier_words}
    words, multipliers = np.zeros(sizes["words"], np.int32), np.zeros(sizes["multipliers"], np.int32)
    real, number = np.zeros(32 * shape.units, np.float32), np.zeros(16, np.int32)
    x = np.zeros(shape.inner // 4, np.int32)
    out = np.zeros(shape.rows, np.float32)
    arguments = [words, multipliers, real, x, real, number, number, number, out, 1, 1, x.nbytes]
    with pytest.raises(AssertionError, match="a wave reads what another wrote before a barrier"):
        Machine(text, arguments, shape.lds_bytes).run(0, 0)


def integers(matrix: Int4Matrix | Int8Matrix, rows: slice) -> torch.Tensor:
    """[E, rows, K] int32: weights without their rows' scales."""
    if isinstance(matrix, Int8Matrix):
        return matrix.values[:, rows].int()
    groups = matrix.nibbles[:, rows].unflatten(-1, (-1, 16))
    values = torch.cat([groups & 15, groups >> 4], dim=-1).int() - 8
    return (values * matrix.multipliers[:, rows, :, None].int()).flatten(2)


def test_assembly_is_read() -> None:
    isa = read_isa(TEXT)
    assert (isa.vgpr, isa.sgpr, isa.spills, isa.parked, isa.scratch, isa.lds) == (104, 12, 2, 1, 0, 64)
    assert isa.waves == 4
    assert (isa.matrix, isa.vector) == (1, 1)
    assert isa.loop == Counter(["v_xor_b32_e32", "v_mfma_i32_16x16x32_i8"])
    unrolled = read_isa(TEXT.replace("s_cbranch_scc0 .LBB0_2", "s_nop 0"))
    assert (unrolled.matrix, unrolled.vector) == (1, 2)
    with pytest.raises(ValueError, match="the assembly's metadata has no 'sgpr_count'"):
        read_isa(TEXT.replace(".sgpr_count", ".other"))


@needs_compiler
def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(BuildError, match=r"w4_down_t48_k64 for gfx942: .*KeyError: 48"):
        build(ProductShape(4, 64, 64, 4, False, 48), "gfx942")
