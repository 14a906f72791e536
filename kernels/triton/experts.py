"""The routed experts: gate and up, SiLU, rounding again, down, over tiles of weights and blocks of one expert's pairs.

Weights are the left factor of every product and 8 to 128 pairs the right one, so that a few tokens an expert waste
nothing of a matrix instruction, and INT4 is unpacked in the registers that the instruction reads. The integer sums
are exact, and their epilogue rounds as the reference does, so INT8 results equal its bits.
"""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import PairShapes
from ..protocol import ActivationFormat, Activations, Bf16Matrix, ExpertMatrix, Fp8Matrix, Int4Matrix, Int8Matrix
from .arithmetic import bfloat_parts, from_e4m3, ordered_silu
from .grouping import PairBlocks, group_pairs
from .layouts import ROWS, TiledExperts, TiledMatrix
from .quantize import quantize
from .tiles import Tile, TileTable, row_order
from .unpacking import unpacked

INT4, INT8, FP8, BF16 = (tl.constexpr(code) for code in range(4))
_KINDS: dict[type[ExpertMatrix], int] = {Int4Matrix: 0, Int8Matrix: 1, Fp8Matrix: 2, Bf16Matrix: 3}
_WORDS = {Int4Matrix: torch.int32, Int8Matrix: torch.int8, Fp8Matrix: torch.uint8, Bf16Matrix: torch.bfloat16}
_UNSORTED_PAIRS = 8
"""Up to so many pairs each is a block by itself: sorting would take longer than reading one expert twice."""


@triton.jit
def _columns(x, at, k, valid, INNER: tl.constexpr, EVEN: tl.constexpr):
    """Activations at columns k; zeros outside K and for unused places."""
    mask = valid[:, None] if EVEN else valid[:, None] & (k < INNER)[None, :]
    return tl.load(x + at[:, None] + k[None, :], mask=mask, other=0)


@triton.jit
def expert_products(
    x, x_scale, tiles, multipliers, scale, pair_row, order, block_expert, out,
    pairs, width, height,
    INNER: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    GATED: tl.constexpr, SORTED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one expert times one block of its pairs; program (row tile, block).

    x [T, INNER] and x_scale [T] are read at row pair_row[p] for pair p where GATED, else at p. tiles, multipliers,
    scale: of `TiledMatrix`, `height` row tiles an expert. out [P, width] float32: silu(gate) * up where GATED.
    SORTED: order and block_expert are those of `PairBlocks`; else block p is pair p, of expert block_expert[p].
    """
    row_tile = tl.program_id(0)
    block = tl.program_id(1)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    place = tl.arange(0, SIZE)
    if SORTED:
        pair = tl.load(order + block * SIZE + place)
        valid = pair < pairs
    else:
        pair = block + place
        valid = place < 1
    source = tl.load(pair_row + pair, mask=valid, other=0) if GATED else pair
    at = source.to(tl.int64) * INNER
    COLUMNS: tl.constexpr = 256 if KIND == INT4 else (64 if KIND == BF16 else 128)
    DEPTH: tl.constexpr = (INNER + COLUMNS - 1) // COLUMNS
    EVEN: tl.constexpr = INNER % COLUMNS == 0
    WORDS: tl.constexpr = 32 if KIND == INT4 else COLUMNS
    row = tl.arange(0, ROWS)
    first = (expert * height + row_tile) * DEPTH
    weight = tiles + first * (ROWS * WORDS) + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    factor = multipliers + first * (ROWS * 4) + row[:, None] * 4 + tl.arange(0, 4)[None, :]
    total = tl.zeros((ROWS, SIZE), tl.int32 if KIND <= INT8 else tl.float32)
    for step in tl.range(0, DEPTH, num_stages=STAGES):
        begin = step * COLUMNS
        w = tl.load(weight)
        if KIND == INT4:
            packed = tl.load(factor).to(tl.int32)
            k = begin + tl.arange(0, 128)
            low = _columns(x, at, k, valid, INNER, EVEN)
            high = _columns(x, at, k + 128, valid, INNER, EVEN)
            lower = unpacked(w & 0x0F0F0F0F, packed & 15, ROWS, 4)
            total = tl.dot(lower, low.T, total, out_dtype=tl.int32)
            upper = unpacked((w >> 4) & 0x0F0F0F0F, (packed >> 4) & 15, ROWS, 4)
            total = tl.dot(upper, high.T, total, out_dtype=tl.int32)
            factor += ROWS * 4
        else:
            rows = _columns(x, at, begin + tl.arange(0, COLUMNS), valid, INNER, EVEN)
            if KIND == INT8:
                total = tl.dot(w, rows.T, total, out_dtype=tl.int32)
            elif KIND == FP8:
                total = tl.dot(from_e4m3(w), from_e4m3(rows).T, total)
            else:
                high, middle, low = bfloat_parts(rows)
                part = tl.dot(w, low.T)
                part = tl.dot(w, middle.T, part)
                part = tl.dot(w, high.T, part)
                total += part  # matrix units cut their sums off; over all of K that adds up
        weight += ROWS * WORDS
    result = total.to(tl.float32)
    if KIND == FP8:
        result = result * 65536.0  # both factors are 2^-8 of their values
    if KIND != BF16:
        result = result * tl.load(x_scale + source, mask=valid, other=0.0)[None, :]
        result = result * tl.load(scale + (expert * height + row_tile) * ROWS + row)[:, None]
    if GATED:
        gate, up = tl.split(result.reshape(ROWS // 16, 2, 8, SIZE).permute(0, 2, 3, 1))
        hidden = (ordered_silu(gate) * up).reshape(ROWS // 2, SIZE)
        column = row_tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
        inside = (column < width)[:, None] & valid[None, :]
        tl.store(out + pair.to(tl.int64)[None, :] * width + column[:, None], hidden, mask=inside)
    else:
        column = row_tile * ROWS + row
        inside = (column < width)[:, None] & valid[None, :]
        tl.store(out + pair.to(tl.int64)[None, :] * width + column[:, None], result, mask=inside)


def multiply(
    x: Activations, matrix: TiledMatrix, pair_row: Tensor | None, blocks: PairBlocks | None, expert: Tensor, tile: Tile,
    amd: bool,
) -> Tensor:  # fmt: skip
    """Every pair's row of x times the transpose of its expert's matrix -> [P, N] float32.

    pair_row [P] int32: the row of x of each pair of gate and up, whose result is silu(gate) * up [P, N / 2]; None:
    row p, and the product itself. blocks: None where each pair is a block. expert [P] int32. amd: whether the GPU is
    one of AMD's.
    """
    gated, pairs = pair_row is not None, expert.shape[0]
    width = matrix.rows // 2 if gated else matrix.rows
    out = torch.empty((pairs, width), dtype=torch.float32, device=x.values.device)
    height = matrix.tiles.shape[1]
    fp8 = x.format is ActivationFormat.FP8
    bound = {"maxnreg": tile.registers} if tile.registers else {}
    if matrix.kind in (Fp8Matrix, Bf16Matrix):
        bound |= row_order(amd)
    unused = expert  # a kernel reads a pointer only where its constants say so
    expert_products[(height, pairs if blocks is None else blocks.expert.shape[0])](
        x.values.view(torch.uint8) if fp8 else x.values,
        unused if x.scale is None else x.scale,
        matrix.tiles.view(_WORDS[matrix.kind]),
        unused if matrix.multipliers is None else matrix.multipliers,
        unused if matrix.scale is None else matrix.scale,
        unused if pair_row is None else pair_row,
        unused if blocks is None else blocks.order,
        expert if blocks is None else blocks.expert,
        out, pairs, width, height,
        matrix.inner, _KINDS[matrix.kind], tile.rows, ROWS, gated, blocks is not None, tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False, **bound,
    )  # fmt: skip
    return out


def run_experts(
    x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: TiledExperts, shapes: PairShapes, tiles: TileTable
) -> Tensor:
    """`Kernels.experts` over tiled weights: [P, D] float32."""
    if shapes.pairs == 0:
        return torch.zeros((0, shapes.hidden), dtype=torch.float32, device=x.values.device)
    kind = weights.gate_up.kind
    first, second = (tiles.tile(kind, gated, shapes.pairs) for gated in (True, False))
    blocks = other = None
    if shapes.pairs > _UNSORTED_PAIRS:
        blocks = group_pairs(pair_expert, shapes.experts, first.rows)
        other = blocks if second.rows == first.rows else group_pairs(pair_expert, shapes.experts, second.rows)
    hidden = multiply(x, weights.gate_up, pair_token, blocks, pair_expert, first, tiles.amd)
    rows = Activations(x.format, hidden, None) if x.format is ActivationFormat.FLOAT else quantize(hidden, x.format)
    return multiply(rows, weights.down, None, other, pair_expert, second, tiles.amd)


__all__ = ["expert_products", "multiply", "run_experts"]
