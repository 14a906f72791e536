"""Absorbed latent attention that reads each entry once: scores and values are products of the same piece of shared
memory, and the sums of a query's heads stay in registers.

A context is cut into blocks of KEYS entries. Each is multiplied from zero, relative to a whole number above its own
largest score, so that blocks are weighed by powers of 2 and added one after another: a program that runs through all
of a query's blocks has the bits of programs of one block each, whose sums `merge_blocks` adds. Contexts of more than
FOLDED blocks are cut into longer units, whose sums are always merged. So a query's bits come from its own length alone.
"""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..protocol import PagedBatch

_LOG2_E = 1.4426950408889634
_SCRATCH_BYTES = 1 << 29
"""Queries run in slices whose unmerged units take no more than this."""
_FAR: tl.constexpr = tl.constexpr(60.0)
"""A share of 2^-60 of its block's largest, and a block of 2^-60 of another, counts as nothing: so powers of 2 weigh
what is left without losing a bit."""


@dataclass(frozen=True)
class BlockTile:
    """heads: of one query a program takes. keys: of a block. piece: columns of an entry that are multiplied at once.
    folded: the most blocks of a context that one program may add up in registers. unit: at least so many blocks are
    added up together in a longer context, cut into no more than `units`. programs: that a GPU runs at once. apart: a
    query's blocks are given to several programs where that makes at least so many; where it does not, `gluon` runs
    `attention_gluon`'s kernel, of the same bits."""

    heads: int = 64
    keys: int = 64
    piece: int = 128
    folded: int = 32
    unit: int = 8
    units: int = 64
    programs: int = 132
    apart: int = 4
    warps: int = 8
    stages: int = 2
    gluon: bool = False

    def most_units(self, keys: int, fold: bool) -> int:
        """Sums that a query of up to so many keys leaves for merging."""
        blocks = triton.cdiv(keys, self.keys)
        long = min(self.units, triton.cdiv(blocks, self.unit)) if blocks > self.folded else 0
        return long if fold else max(long, min(blocks, self.folded), 1)


@triton.jit
def _unit(blocks, FOLDED: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr):
    """Blocks of a unit of a context."""
    return tl.where(blocks <= FOLDED, 1, tl.maximum(UNIT, tl.cdiv(blocks, UNITS)))


@triton.jit
def _power(exponent):
    """2^exponent of whole numbers <= 0, 0 from -_FAR down."""
    bits = (tl.maximum(exponent, -_FAR).to(tl.int32) + 127) << 23
    return tl.where(exponent > -_FAR, bits.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _piece(row, begin, column, real, ALL: tl.constexpr, LIMIT: tl.constexpr, EVEN: tl.constexpr):
    """Some columns of rows, zeros for rows that are not real and beyond LIMIT. ALL, EVEN: that there are none such."""
    if EVEN:
        return tl.load(row + begin + column) if ALL else tl.load(row + begin + column, mask=real, other=0.0)
    return tl.load(row + begin + column, mask=real & (begin + column < LIMIT), other=0.0)


# A page size known to be a multiple of 16 made Triton 3.6 assume aligned entries of any width.
@triton.jit(do_not_specialize=["page_size"])
def attend_blocks(
    q, pages, query_start, page_table, positions, out, sums, tops,
    first, sequences, max_pages, page_size, num_pages, places, scale,
    heads: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, ROPE_2: tl.constexpr, SEQUENCES: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, PIECE: tl.constexpr, FOLD: tl.constexpr,
    FOLDED: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Units of one query for HEADS heads; program (query from the last, heads, z) takes the z-th and every so many.

    q [T, H, LATENT + ROPE] and pages: bfloat16. FOLD: contexts of up to FOLDED blocks are one program's, which writes
    out [T, H, LATENT] float32. Else sums [queries, places, H, LATENT] and tops [queries, places, H, 2] float32 get a
    unit's values, the whole number above its largest score, and the sum of its shares. scale: of powers of 2, > 0.
    """
    local = tl.num_programs(0) - 1 - tl.program_id(0)
    query = first + local
    visible = tl.maximum((tl.load(positions + query) + 1).to(tl.int32), 1)
    blocks = tl.cdiv(visible, KEYS)
    unit = _unit(blocks, FOLDED, UNIT, UNITS)
    whole = FOLD and blocks <= FOLDED
    if whole:
        unit = blocks
    units = tl.cdiv(blocks, unit)
    if tl.program_id(2) >= units:
        return
    number = tl.arange(0, SEQUENCES)
    starts = tl.load(query_start + 1 + number, mask=number < sequences, other=2147483647)
    table = page_table + tl.sum((starts <= query).to(tl.int32), 0) * max_pages
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = (head < heads)[:, None]
    column, turned, key = tl.arange(0, PIECE)[None, :], tl.arange(0, ROPE_2)[None, :], tl.arange(0, KEYS)
    WIDTH: tl.constexpr = LATENT + ROPE
    PIECES: tl.constexpr = (LATENT + PIECE - 1) // PIECE
    EVEN: tl.constexpr = LATENT % PIECE == 0
    ALL: tl.constexpr = heads % HEADS == 0
    row = q + (query.to(tl.int64) * heads + head)[:, None] * WIDTH
    asked = ()
    for c in tl.static_range(PIECES):
        asked += (_piece(row, c * PIECE, column, real, ALL, LATENT, EVEN),)
    asked_turned = _piece(row, LATENT, turned, real, ALL, WIDTH, ROPE == ROPE_2)
    for at in range(tl.program_id(2), units, tl.num_programs(2)):
        begin = at * unit
        top = tl.full((HEADS,), float("-inf"), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        values = ()
        for _ in tl.static_range(PIECES):
            values += (tl.zeros((HEADS, PIECE), tl.float32),)
        # A block's pages are looked up while the block before is multiplied.
        position = begin * KEYS + key
        page = tl.load(table + position // page_size, mask=position < visible, other=-1)
        for block in tl.range(begin, tl.minimum(begin + unit, blocks), num_stages=STAGES):
            position = block * KEYS + key
            present = ((page >= 0) & (page < num_pages))[:, None]
            entry = pages + (page * page_size + position % page_size).to(tl.int64)[:, None] * WIDTH
            ahead = position + KEYS
            page = tl.load(table + ahead // page_size, mask=ahead < visible, other=-1)
            latent = ()
            for c in tl.static_range(PIECES):
                latent += (_piece(entry, c * PIECE, column, present, False, LATENT, EVEN),)
            rotated = _piece(entry, LATENT, turned, present, False, WIDTH, ROPE == ROPE_2)
            score = tl.dot(asked[0], latent[0].T)
            for c in tl.static_range(1, PIECES):
                score = tl.dot(asked[c], latent[c].T, score)
            score = tl.dot(asked_turned, rotated.T, score)
            score = tl.where((position < visible)[None, :], score * scale, float("-inf"))
            highest = tl.ceil(tl.max(score, 1))
            after = tl.maximum(top, highest)
            decay, weight = _power(top - after), _power(highest - after)
            score -= highest[:, None]
            share = tl.where(score <= -_FAR, 0.0, tl.exp2(score))  # NaN stays
            total = tl.fma(total, decay, tl.sum(share, 1) * weight)
            share = (share * weight[:, None]).to(latent[0].dtype)
            top = after
            more = ()
            for c in tl.static_range(PIECES):
                part = tl.dot(share, latent[c])
                more += (tl.fma(values[c], decay[:, None] + tl.zeros_like(part), part),)
            values = more
        if whole:
            target = out + (query.to(tl.int64) * heads + head)[:, None] * LATENT
            for c in tl.static_range(PIECES):
                result = tl.div_rn(values[c], total[:, None] + tl.zeros_like(values[c]))
                tl.store(target + c * PIECE + column, result, mask=real & (c * PIECE + column < LATENT))
        else:
            place = (local.to(tl.int64) * places + at) * heads + head
            target = sums + place[:, None] * LATENT
            for c in tl.static_range(PIECES):
                tl.store(target + c * PIECE + column, values[c], mask=real & (c * PIECE + column < LATENT))
            tl.store(tops + 2 * place, top, mask=head < heads)
            tl.store(tops + 2 * place + 1, total, mask=head < heads)


@triton.jit
def merge_blocks(
    sums, tops, positions, out, first, heads, places,
    LATENT: tl.constexpr, LATENT_2: tl.constexpr, KEYS: tl.constexpr, FOLD: tl.constexpr,
    FOLDED: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """out [T, H, LATENT] of one query, units weighed and added as `attend_blocks` does blocks; program (query, h) takes
    the h-th head and every so many."""
    local = tl.program_id(0)
    visible = tl.maximum((tl.load(positions + first + local) + 1).to(tl.int32), 1)
    blocks = tl.cdiv(visible, KEYS)
    if FOLD and blocks <= FOLDED:
        return
    units = tl.cdiv(blocks, _unit(blocks, FOLDED, UNIT, UNITS))
    latent = tl.arange(0, LATENT_2)
    for head in range(tl.program_id(1), heads, tl.num_programs(1)):
        at = local.to(tl.int64) * places * heads + head
        top, total = float("-inf"), 0.0
        values = tl.zeros((LATENT_2,), tl.float32)
        for _ in range(units):
            highest = tl.load(tops + 2 * at)
            after = tl.maximum(top, highest)
            decay, weight = _power(top - after), _power(highest - after)
            part = tl.load(sums + at * LATENT + latent, mask=latent < LATENT, other=0.0) * weight
            total = tl.fma(total, decay, tl.load(tops + 2 * at + 1) * weight)
            values = tl.fma(values, decay + tl.zeros_like(part), part)
            top = after
            at += heads
        row = (first + local).to(tl.int64) * heads + head
        tl.store(out + row * LATENT + latent, tl.div_rn(values, total + tl.zeros_like(values)), mask=latent < LATENT)


def attend(q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, out: Tensor, tile: BlockTile) -> None:
    """q [T, H, L + R] and pages [num_pages, page_size, L + R] bfloat16 -> out [T, H, L] float32; scale > 0."""
    queries, heads, width = q.shape
    rank = out.shape[2]
    num_pages, page_size, _ = pages.shape
    sequences, max_pages = batch.page_table.shape
    together = max(1, tile.programs // (queries * triton.cdiv(heads, tile.heads)))
    fold = together < tile.apart
    places = tile.most_units(max_pages * page_size, fold)
    slice_size = max(1, min(queries, _SCRATCH_BYTES // (4 * max(places, 1) * heads * rank)))
    sums = torch.empty((slice_size, places, heads, rank), dtype=torch.float32, device=q.device)
    tops = torch.empty((slice_size, places, heads, 2), dtype=torch.float32, device=q.device)
    latent_2, rope_2 = triton.next_power_of_2(rank), max(16, triton.next_power_of_2(width - rank))
    cut, in_all = (tile.folded, tile.unit, tile.units), triton.next_power_of_2(max(sequences, 1))
    for first in range(0, queries, slice_size):
        count = min(slice_size, queries - first)
        grid = count, triton.cdiv(heads, tile.heads), max(1, min(together, places))
        given = (
            q, pages, batch.query_start, batch.page_table, batch.positions, out, sums, tops,
            first, sequences, max_pages, page_size, num_pages, places, scale * _LOG2_E, heads, rank, width - rank,
        )  # fmt: skip
        if tile.gluon and fold and rank % tile.piece == 0 and width - rank == 64:
            from .attention_gluon import attend_blocks_gluon  # which nothing interprets

            attend_blocks_gluon[grid](
                *given, in_all, tile.heads, tile.keys, tile.piece, fold, *cut,
                num_warps=tile.warps, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            attend_blocks[grid](
                *given, rope_2, in_all, tile.heads, tile.keys, min(tile.piece, max(16, latent_2)), fold, *cut,
                tile.stages, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
            )  # fmt: skip
        if places:
            # Most queries of many have nothing to be merged.
            merge_blocks[(count, min(heads, 8) if fold else heads)](
                sums, tops, batch.positions, out, first, heads, places,
                rank, latent_2, tile.keys, fold, *cut,
                num_warps=4 if latent_2 >= 256 else 1, enable_fp_fusion=False,
            )  # fmt: skip


__all__ = ["BlockTile", "attend"]
