"""INT8 and INT4 linears by exact integer sums. Weights are the left factor."""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..protocol import ActivationFormat, Activations, Int4Weight, Int8Weight
from .arithmetic import ordered_silu
from .linear_tiles import LinearTuning
from .quantize import store_quantized
from .unpacking import unpacked

_TOKEN_TILES = tl.constexpr(8)
"""So many tiles of tokens are multiplied with a tile of weights one after the other, while it is in the cache."""
_IN_HAND = 1024
"""Sums that a warp stores, or reads of other parts, at once."""


@triton.jit
def _tile(tokens, outputs, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Which rows and which tokens program_id(0) multiplies."""
    row_tiles, token_tiles = tl.cdiv(outputs, ROWS), tl.cdiv(tokens, SIZE)
    first = tl.program_id(0) // (_TOKEN_TILES * row_tiles) * _TOKEN_TILES
    inside = tl.program_id(0) - first * row_tiles
    together = tl.minimum(token_tiles - first, _TOKEN_TILES)
    return inside // together, first + inside % together


@triton.jit
def _product(
    x, values, multipliers, own, token, valid, first, steps, inner,
    INT4: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """int32 [ROWS, SIZE]: `steps` times COLUMNS of K from `first` on. A group of 32 INT4 values has its first 16 in low
    nibbles: the two halves of a tile multiply every other 16 activations."""
    WORDS: tl.constexpr = COLUMNS // 8 if INT4 else COLUMNS
    VALUES: tl.constexpr = COLUMNS // WORDS
    GROUPS: tl.constexpr = COLUMNS // 32
    column = tl.arange(0, COLUMNS // 2 if INT4 else COLUMNS)
    k = (column // 16) * 32 + column % 16 if INT4 else column
    word, group = tl.arange(0, WORDS), tl.arange(0, GROUPS)
    source = x + token.to(tl.int64)[:, None] * inner + first + k[None, :]
    weight = values + own * (inner // VALUES) + first // VALUES + word[None, :]
    factor = multipliers + own * (inner // 32) + first // 32 + group[None, :]
    total = tl.zeros((ROWS, SIZE), tl.int32)
    for step in tl.range(0, steps, num_stages=STAGES):
        left = inner - first - step * COLUMNS
        if EVEN:
            w, rows = tl.load(weight), tl.load(source, mask=valid[:, None], other=0)
        else:
            w = tl.load(weight, mask=(word * VALUES < left)[None, :], other=0)
            rows = tl.load(source, mask=valid[:, None] & (k < left)[None, :], other=0)
        if INT4:
            if EVEN:
                high = tl.load(source + 16, mask=valid[:, None], other=0)
                multiplier = tl.load(factor).to(tl.int32)
            else:
                high = tl.load(source + 16, mask=valid[:, None] & (k + 16 < left)[None, :], other=0)
                multiplier = tl.load(factor, mask=(group * 32 < left)[None, :], other=0).to(tl.int32)
            lower = unpacked(w & 0x0F0F0F0F, multiplier, ROWS, GROUPS, WORDS)
            total = tl.dot(lower, rows.T, total, out_dtype=tl.int32)
            upper = unpacked((w >> 4) & 0x0F0F0F0F, multiplier, ROWS, GROUPS, WORDS)
            total = tl.dot(upper, high.T, total, out_dtype=tl.int32)
            factor += GROUPS
        else:
            total = tl.dot(w, rows.T, total, out_dtype=tl.int32)
        weight += WORDS
        source += COLUMNS
    return total


@triton.jit
def _store(sums, x_scale, scale, residual, out, row, token, tokens, outputs,
    KEEP: tl.constexpr, IN_TURN: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """int32 sums [ROWS, SIZE] of the rows and tokens from `row` and `token` on to out [tokens, outputs], scaled, or as
    they are where KEEP. PIECE tokens at a time, for addresses of many take more registers than there are."""
    if SIZE > PIECE:
        first, second = tl.split(sums.reshape(ROWS, 2, SIZE // 2).permute(0, 2, 1))
        _store(first, x_scale, scale, residual, out, row, token, tokens, outputs,
            KEEP, IN_TURN, RESIDUAL, ROWS, SIZE // 2, PIECE)  # fmt: skip
        _store(second, x_scale, scale, residual, out, row, token + SIZE // 2, tokens, outputs,
            KEEP, IN_TURN, RESIDUAL, ROWS, SIZE // 2, PIECE)  # fmt: skip
    else:
        rows, some = tl.arange(0, ROWS), tl.arange(0, SIZE)
        here, valid = rows < outputs - row, some < tokens - token
        inside = here[:, None] & valid[None, :]
        corner = token.to(tl.int64) * outputs + row
        at = some[None, :] * outputs + rows[:, None]
        if KEEP:
            tl.store(out + corner + at, sums, mask=inside)
        else:
            x_size = tl.load(x_scale + token + some, mask=valid, other=0.0)[None, :]
            w_size = tl.load(scale + row + rows, mask=here, other=0.0)[:, None]
            value = sums.to(tl.float32)
            value = value * x_size * w_size if IN_TURN else value * (x_size * w_size)
            if RESIDUAL:
                value = tl.load(residual + corner + at, mask=inside, other=0.0) + value
            tl.store(out + corner + at, value, mask=inside)


@triton.jit
def _added(parts, row, token, tokens, outputs, ROWS: tl.constexpr, SIZE: tl.constexpr, AT_ONCE: tl.constexpr):
    """The sums of all parts [num_programs(1), tokens, outputs]: [ROWS, SIZE] from `row` and `token` on."""
    rows, some = tl.arange(0, ROWS), tl.arange(0, SIZE)
    inside = (rows < outputs - row)[:, None] & (some < tokens - token)[None, :]
    at = some[None, :] * outputs + rows[:, None]
    corner, size = token.to(tl.int64) * outputs + row, tokens.to(tl.int64) * outputs
    total = tl.zeros((ROWS, SIZE), tl.int32)
    for begin in range(0, tl.num_programs(1), AT_ONCE):
        for other in tl.static_range(AT_ONCE):
            number = begin + other
            there = inside & (tl.full((1, 1), number, tl.int32) < tl.num_programs(1))
            total += tl.load(parts + (number * size + corner) + at, mask=there, other=0)
    return total


@triton.jit(do_not_specialize=["tokens", "steps"])
def integer_products(
    x, values, multipliers, x_scale, scale, residual, out, parts, arrived, tokens, outputs, inner, steps,
    INT4: tl.constexpr, IN_TURN: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PIECE: tl.constexpr,
    AT_ONCE: tl.constexpr, RELEASES: tl.constexpr,
):  # fmt: skip
    """x int8 [tokens, inner] times the transpose of `Int8Weight.values`, or of INT4 nibbles, as int32 words, with their
    multipliers -> out [tokens, outputs] float32, scaled, and added to `residual` where RESIDUAL; program (tile, part).

    Each part takes `steps` times COLUMNS of K. SPLIT: all leave their sums in parts [part, tokens, outputs] int32, and
    the last one to arrive adds them. Integers have the same sum in any order. arrived: a zero for each tile, and zeros
    again when all are done, so that the launch can be replayed.

    Why the last one sees what the others stored. On CUDA: a program's stores come before its barrier, and this before
    one thread's atomic addition, a release at the GPU's scope, which is cumulative: it holds for what any thread stored
    before the barrier. On gfx942 a barrier waits for no wave's stores to global memory, and a release (write back the
    L2, wait) waits for those of its own wave alone: so there each of RELEASES threads, which are all, releases its own
    by an atomic addition of nothing, before the barrier. Then on both: the additions to one counter are each a release
    and an acquire, so that the one that finds all others counted comes after all of them; its acquire makes caches
    forget what is old, for the whole multiprocessor, before its value passes the next barrier to the other threads.
    """
    row_tile, token_tile = _tile(tokens, outputs, SIZE, ROWS)
    row, token = row_tile * ROWS, token_tile * SIZE
    some = token + tl.arange(0, SIZE)
    # Rows beyond the last read that one again: an address costs less than a mask, and what it gives is not stored.
    # Not so the tokens: a few would all read one place, three times slower where they are 1 of 16.
    own = tl.minimum(row + tl.arange(0, ROWS), outputs - 1).to(tl.int64)[:, None]
    part = tl.program_id(1)
    last = tl.minimum(steps, tl.cdiv(inner, COLUMNS) - part * steps)
    total = _product(
        x, values, multipliers, own, some, some < tokens, part * steps * COLUMNS, last, inner,
        INT4, SIZE, ROWS, COLUMNS, EVEN, STAGES,
    )  # fmt: skip
    if SPLIT:
        own_part = parts + part.to(tl.int64) * tokens * outputs
        _store(total, x_scale, scale, residual, own_part, row, token, tokens, outputs,
            True, IN_TURN, RESIDUAL, ROWS, SIZE, PIECE)  # fmt: skip
        if RELEASES:
            tl.atomic_add(arrived + tl.program_id(0) + tl.zeros((RELEASES,), tl.int32), 0, sem="release", scope="gpu")
        tl.debug_barrier()
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
            tl.atomic_xchg(arrived + tl.program_id(0), 0, sem="relaxed", scope="gpu")
            # Its own sums are read again: they are registers of a matrix instruction, in another order than memory's.
            for begin in range(0, SIZE, PIECE):
                sums = _added(parts, row, token + begin, tokens, outputs, ROWS, PIECE, AT_ONCE)
                _store(sums, x_scale, scale, residual, out, row, token + begin, tokens, outputs,
                    False, IN_TURN, RESIDUAL, ROWS, PIECE, PIECE)  # fmt: skip
    else:
        _store(total, x_scale, scale, residual, out, row, token, tokens, outputs,
            False, IN_TURN, RESIDUAL, ROWS, SIZE, PIECE)  # fmt: skip


@triton.jit
def hidden_rows(gate_up, values, scale, width, SIZE: tl.constexpr):
    """gate_up [T, 2 * width] float32 -> silu(gate) * up in INT8 [T, width] and its scales; a row a program."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < width
    at = gate_up + token * 2 * width + column
    gate, up = tl.load(at, mask=inside, other=0.0), tl.load(at + width, mask=inside, other=0.0)
    hidden = tl.where(inside, ordered_silu(gate) * up, 0.0)
    store_quantized(hidden, token * width + column, inside, values, scale, token, False)


@triton.jit
def unpack_weight(nibbles, multipliers, values, groups, GROUPS: tl.constexpr):
    """`groups` groups of an `Int4Weight`, 16 bytes and a multiplier each, as the 32 INT8 values that they stand for."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = (group < groups)[:, None]
    byte = tl.arange(0, 16)[None, :]
    packed = tl.load(nibbles + group[:, None] * 16 + byte, mask=inside, other=0).to(tl.int32)
    factor = tl.load(multipliers + group, mask=group < groups, other=0).to(tl.int32)[:, None]
    at = values + group[:, None] * 32 + byte
    tl.store(at, (((packed & 15) - 8) * factor).to(tl.int8), mask=inside)
    tl.store(at + 16, (((packed >> 4) - 8) * factor).to(tl.int8), mask=inside)


def integer_linear(
    x: Activations,
    weight: Int8Weight | Int4Weight,
    tuning: LinearTuning,
    in_turn: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """INT8 rows [T, K] times the transpose of the weight -> [T, N] float32, the reference's bits. in_turn: sums are
    multiplied by the row's scale and then by the weight's, as experts do, not by the product of both. residual: [T, N]
    float32, to which the product is added."""
    (tokens, inner), outputs, device = x.values.shape, len(weight.scale), x.values.device
    out = torch.empty((tokens, outputs), dtype=torch.float32, device=device)
    if not out.numel():
        return out
    tile = tuning.table.tile(type(weight), outputs, inner, tokens)
    if isinstance(weight, Int4Weight) and tile.unpacked:
        weight = _unpacked(weight)
    int4, unused = isinstance(weight, Int4Weight), out
    values, multipliers = (weight.nibbles.view(torch.int32), weight.multipliers) if int4 else (weight.values, unused)
    tiles, depth = triton.cdiv(outputs, tile.rows) * triton.cdiv(tokens, tile.tokens), triton.cdiv(inner, tile.columns)
    steps = triton.cdiv(depth, min(tile.parts, depth))
    parts = triton.cdiv(depth, steps)
    split = parts > 1
    sums = torch.empty((parts, tokens, outputs), dtype=torch.int32, device=device) if split else unused
    piece = min(tile.tokens, max(16, _IN_HAND * tile.warps // tile.rows))
    at_once = max(1, min(8, _IN_HAND * tile.warps // (tile.rows * piece)))
    integer_products[(tiles, parts)](
        x.values, values, multipliers, x.scale, weight.scale, unused if residual is None else residual, out,
        sums, tuning.arrivals.take(tiles) if split else unused, tokens, outputs, inner, steps,
        int4, in_turn, residual is not None, inner % tile.columns == 0, split,
        tile.rows, tile.tokens, tile.columns, tile.stages, piece, at_once, tuning.releases * tile.warps,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def gated_hidden(x: Activations, gate_up: Int8Weight | Int4Weight, tuning: LinearTuning) -> Activations:
    """INT8 rows [T, K] -> silu(gate) * up in INT8 [T, I], as experts round it; gate_up [2 * I, K]."""
    tokens, width = len(x.values), len(gate_up.scale) // 2
    values = torch.empty((tokens, width), dtype=torch.int8, device=x.values.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.values.device)
    if tokens:
        products, size = integer_linear(x, gate_up, tuning, in_turn=True), triton.next_power_of_2(width)
        hidden_rows[(tokens,)](
            products, values, scale, width, size, num_warps=min(max(size // 512, 1), 16), enable_fp_fusion=False
        )
    return Activations(ActivationFormat.INT8, values, scale)


def _unpacked(weight: Int4Weight) -> Int8Weight:
    outputs, half = weight.nibbles.shape
    values = torch.empty((outputs, 2 * half), dtype=torch.int8, device=weight.nibbles.device)
    groups = weight.multipliers.numel()
    unpack_weight[(triton.cdiv(groups, 128),)](weight.nibbles, weight.multipliers, values, groups, 128)
    return Int8Weight(values, weight.scale)


__all__ = ["gated_hidden", "hidden_rows", "integer_linear"]
