"""Absorbed latent attention over pages. A query's context is cut into splits that its own length alone decides, and a
second kernel merges them in order: its bits are the same in decode, in prefill and in any chunk.

Pages of bfloat16 are multiplied as they are, all heads of a query in one program, queries and shares rounded to
bfloat16 too: 2^-8 of a product at most. Words of float32 pages hold an entry as two bfloat16 parts, and so are queries
and shares taken: the product of two second parts is left out, 2^-18 at most (`Kernels.splits_floats`).
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
from .arithmetic import two_parts

_MAX_SPLITS = 64
_PROGRAMS = 264
"""Splits of a query run one after another in a program where that still leaves so many: two a multiprocessor."""
_SCRATCH_BYTES = 1 << 29
"""Queries run in slices whose unmerged splits take no more than this."""


@dataclass(frozen=True)
class AttentionTile:
    """heads: of one query a program takes. keys: a step of the softmax. split: keys of a split, while that makes no
    more than `_MAX_SPLITS` of them; a multiple of keys."""

    heads: int
    keys: int
    split: int
    warps: int
    stages: int


def attention_tile(kv_dtype: torch.dtype, gpu: str) -> AttentionTile:
    """gpu: "gfx942", whose blocks have 64 KiB of LDS, or "cuda"."""
    exact = kv_dtype is torch.float32
    if gpu == "gfx942":
        return AttentionTile(16 if exact else 64, 16, 256, 4, 1)
    return AttentionTile(16, 32, 256, 4, 1) if exact else AttentionTile(64, 64, 256, 8, 2)


@triton.jit
def _parts(value, PARTS: tl.constexpr):
    """value as one bfloat16, given twice, or as the sum of two."""
    if PARTS == 2:
        return two_parts(value)
    high = value.to(tl.bfloat16)
    return high, high


@triton.jit
def _product(a, a_low, b, b_low, total, PARTS: tl.constexpr):
    """total plus the product of a and b; of two parts each, smallest terms first."""
    if PARTS == 1:
        return tl.dot(a, b, total)
    part = tl.dot(a_low, b)
    part = tl.dot(a, b_low, part)
    return total + tl.dot(a, b, part)


@triton.jit
def _split_length(visible, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Keys a split of a context of `visible` tokens: a multiple of SPLIT."""
    return SPLIT * ((visible + SPLIT * MAX_SPLITS - 1) // (SPLIT * MAX_SPLITS))


# A page size known to be a multiple of 16 made Triton 3.6 assume aligned entries of any width.
@triton.jit(do_not_specialize=["page_size"])
def attend_splits(
    q, pages, query_start, page_table, positions, sums, tops, totals,
    first, heads, sequences, max_pages, page_size, num_pages, splits, scale,
    LATENT: tl.constexpr, ROPE: tl.constexpr, LATENT_2: tl.constexpr, ROPE_2: tl.constexpr, SEQUENCES: tl.constexpr,
    PARTS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Some splits of one query for HEADS heads; program (query, heads, z) takes an equal run of splits, the z-th.

    pages: bfloat16, PARTS values for each of an entry. sums [queries, splits, H, LATENT] bfloat16 or float32, tops and
    totals [queries, splits, H] float32: unnormalized values, largest score and sum of shares of each split.
    """
    local = tl.program_id(0)
    query = first + local
    visible = tl.maximum((tl.load(positions + query) + 1).to(tl.int32), 1)
    length = _split_length(visible, SPLIT, MAX_SPLITS)
    run = length * tl.cdiv(tl.cdiv(visible, length), tl.num_programs(2))
    begin = tl.program_id(2) * run
    if begin >= visible:
        return
    end = tl.minimum(begin + run, visible)
    number = tl.arange(0, SEQUENCES)
    starts = tl.load(query_start + 1 + number, mask=number < sequences, other=2147483647)
    table = page_table + tl.sum((starts <= query).to(tl.int32), 0) * max_pages
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    latent, turned, key = tl.arange(0, LATENT_2), tl.arange(0, ROPE_2), tl.arange(0, KEYS)
    real, inside, rotated = (head < heads)[:, None], (latent < LATENT)[None, :], (turned < ROPE)[None, :]
    WIDTH: tl.constexpr = LATENT + ROPE
    row = q + (query.to(tl.int64) * heads + head)[:, None] * WIDTH
    q_latent, q_latent_low = _parts(tl.load(row + latent[None, :], mask=real & inside, other=0.0), PARTS)
    q_rope, q_rope_low = _parts(tl.load(row + LATENT + turned[None, :], mask=real & rotated, other=0.0), PARTS)
    for split in range(begin // length, tl.cdiv(end, length)):
        top = tl.full((HEADS,), float("-inf"), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        result = tl.zeros((HEADS, LATENT_2), tl.float32)
        last = tl.minimum((split + 1) * length, end)
        for at in tl.range(split * length, last, KEYS, num_stages=STAGES):
            position = at + key
            page = tl.load(table + position // page_size, mask=position < last, other=-1)
            seen = (page >= 0) & (page < num_pages)
            entry = pages + (page.to(tl.int64) * page_size + position % page_size)[:, None] * (WIDTH * PARTS)
            k = tl.load(entry + latent[None, :], mask=seen[:, None] & inside, other=0.0)
            r = tl.load(entry + LATENT + turned[None, :], mask=seen[:, None] & rotated, other=0.0)
            k_low, r_low = k, r
            if PARTS == 2:
                k_low = tl.load(entry + WIDTH + latent[None, :], mask=seen[:, None] & inside, other=0.0)
                r_low = tl.load(entry + WIDTH + LATENT + turned[None, :], mask=seen[:, None] & rotated, other=0.0)
            score = tl.zeros((HEADS, KEYS), tl.float32)
            score = _product(q_rope, q_rope_low, r.T, r_low.T, score, PARTS)
            score = _product(q_latent, q_latent_low, k.T, k_low.T, score, PARTS) * scale
            score = tl.where(seen[None, :], score, float("-inf"))
            raised = tl.maximum(top, tl.max(score, 1))
            decay = tl.exp(top - raised)
            share = tl.exp(score - raised[:, None])
            total = total * decay + tl.sum(share, 1)
            s, s_low = _parts(share, PARTS)
            result = _product(s, s_low, k, k_low, result * decay[:, None], PARTS)
            top = raised
        place = (local.to(tl.int64) * splits + split) * heads + head
        tl.store(sums + place[:, None] * LATENT + latent[None, :], result, mask=real & inside)
        tl.store(tops + place, top, mask=head < heads)
        tl.store(totals + place, total, mask=head < heads)


@triton.jit
def merge_splits(
    sums, tops, totals, positions, out, first, heads, splits,
    LATENT: tl.constexpr, LATENT_2: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """out [T, H, LATENT] of one query and head a program, the splits added in their order."""
    local, head = tl.program_id(0), tl.program_id(1)
    visible = tl.maximum((tl.load(positions + first + local) + 1).to(tl.int32), 1)
    count = tl.cdiv(visible, _split_length(visible, SPLIT, MAX_SPLITS))
    at = local.to(tl.int64) * splits * heads + head
    number = tl.arange(0, MAX_SPLITS)
    top = tl.max(tl.load(tops + at + number * heads, mask=number < count, other=float("-inf")), 0)
    latent = tl.arange(0, LATENT_2)
    total = 0.0
    result = tl.zeros((LATENT_2,), tl.float32)
    for split in range(count):
        share = tl.exp(tl.load(tops + at + split * heads) - top)
        total += tl.load(totals + at + split * heads) * share
        value = tl.load(sums + (at + split * heads) * LATENT + latent, mask=latent < LATENT, other=0.0)
        result += value.to(tl.float32) * share
    row = (first + local).to(tl.int64) * heads + head
    tl.store(out + row * LATENT + latent, tl.div_rn(result, total + tl.zeros_like(result)), mask=latent < LATENT)


def mla_attention(q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, rank: int, tile: AttentionTile) -> Tensor:
    """`Kernels.mla_attention`: q [T, H, L + R] float32 or bfloat16, pages [num_pages, page_size, L + R] bfloat16, or
    float32 words as `rows.write_kv` writes them -> [T, H, L] float32."""
    queries, heads, width = q.shape
    num_pages, page_size, _ = pages.shape
    sequences, max_pages = batch.page_table.shape
    out = torch.empty((queries, heads, rank), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    q = q.to(pages.dtype)
    splits = max(1, min(_MAX_SPLITS, triton.cdiv(max_pages * page_size, tile.split)))
    slice_size = max(1, min(queries, _SCRATCH_BYTES // (4 * splits * heads * rank)))
    sums = torch.empty((slice_size, splits, heads, rank), dtype=pages.dtype, device=q.device)
    tops = torch.empty((2, slice_size, splits, heads), dtype=torch.float32, device=q.device)
    latent_2 = max(16, triton.next_power_of_2(rank))
    rope_2 = max(16, triton.next_power_of_2(width - rank)) if width > rank else 16
    for first in range(0, queries, slice_size):
        count = min(slice_size, queries - first)
        together = min(splits, triton.next_power_of_2(triton.cdiv(_PROGRAMS, count)))
        attend_splits[(count, triton.cdiv(heads, tile.heads), together)](
            q, pages.view(torch.bfloat16), batch.query_start, batch.page_table, batch.positions, sums, tops[0], tops[1],
            first, heads, sequences, max_pages, page_size, num_pages, splits, scale,
            rank, width - rank, latent_2, rope_2, triton.next_power_of_2(max(sequences, 1)),
            pages.dtype.itemsize // 2, tile.heads, tile.keys, tile.split, _MAX_SPLITS, tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        merge_splits[(count, heads)](
            sums, tops[0], tops[1], batch.positions, out, first, heads, splits,
            rank, latent_2, tile.split, _MAX_SPLITS, num_warps=4 if latent_2 >= 256 else 1,
        )  # fmt: skip
    return out


__all__ = ["AttentionTile", "attention_tile", "mla_attention"]
