"""Absorbed latent attention over pages. A query's context is cut into splits that its own length alone decides, one
program each, and a second kernel merges them in order: its bits are the same in decode, in prefill and in any chunk.

q and the entries are split into two bfloat16 parts each, as are the shares: the product of two second parts is left
out, 2^-18 of a term at most (`Kernels.splits_floats`).
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

_MAX_SPLITS = 32
_SCRATCH_BYTES = 1 << 29
"""Queries run in slices whose unmerged splits take no more than this."""


@dataclass(frozen=True)
class AttentionTile:
    """heads: of one query a program takes. keys: a step of the softmax. columns: of L a step of the scores. split: keys
    of a split, while that makes no more than `_MAX_SPLITS` of them."""

    heads: int = 16
    keys: int = 32
    columns: int = 128
    split: int = 64
    warps: int = 4


@triton.jit
def _two_parts(value):
    high = value.to(tl.bfloat16)
    return high, (value - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _scores(q, keys, q_mask, key_mask):
    """Products of some columns of q with the same of keys, two parts each."""
    q_high, q_low = _two_parts(tl.load(q, mask=q_mask, other=0.0))
    k_high, k_low = _two_parts(tl.load(keys, mask=key_mask, other=0.0))
    part = tl.dot(q_low, k_high.T)
    part = tl.dot(q_high, k_low.T, part)
    return tl.dot(q_high, k_high.T, part)


@triton.jit
def _split_length(visible, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Keys a split of a context of `visible` tokens: a multiple of SPLIT."""
    return SPLIT * ((visible + SPLIT * MAX_SPLITS - 1) // (SPLIT * MAX_SPLITS))


# A page size known to be a multiple of 16 made Triton 3.6 assume aligned entries of any width.
@triton.jit(do_not_specialize=["page_size"])
def attend_split(
    q, pages, query_start, page_table, positions, sums, tops, totals,
    first, heads, sequences, max_pages, page_size, num_pages, splits, scale,
    LATENT: tl.constexpr, ROPE: tl.constexpr, LATENT_2: tl.constexpr, ROPE_2: tl.constexpr, SEQUENCES: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """One split of one query for HEADS heads; program (query, heads, split). sums [queries, splits, H, LATENT], tops
    and totals [queries, splits, H] float32: unnormalized values, largest score and sum of shares of each split.
    """
    local = tl.program_id(0)
    query = first + local
    split = tl.program_id(2)
    visible = (tl.load(positions + query) + 1).to(tl.int32)
    length = _split_length(visible, SPLIT, MAX_SPLITS)
    begin = split * length
    if begin >= visible:
        return
    end = tl.minimum(begin + length, visible)
    number = tl.arange(0, SEQUENCES)
    starts = tl.load(query_start + 1 + number, mask=number < sequences, other=2147483647)
    sequence = tl.sum((starts <= query).to(tl.int32), 0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    latent, turned, key = tl.arange(0, LATENT_2), tl.arange(0, ROPE_2), tl.arange(0, KEYS)
    column = tl.arange(0, COLUMNS)
    WIDTH: tl.constexpr = LATENT + ROPE
    row = q + (query.to(tl.int64) * heads + head)[:, None] * WIDTH
    real = (head < heads)[:, None]
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    result = tl.zeros((HEADS, LATENT_2), tl.float32)
    for at in range(begin, end, KEYS):
        position = at + key
        seen = position < end
        page = tl.load(page_table + sequence * max_pages + position // page_size, mask=seen, other=0)
        seen = seen & (page >= 0) & (page < num_pages)
        entry = pages + (page.to(tl.int64) * page_size + position % page_size)[:, None] * WIDTH
        r_mask, t_mask = real & (turned < ROPE)[None, :], seen[:, None] & (turned < ROPE)[None, :]
        score = _scores(row + LATENT + turned[None, :], entry + LATENT + turned[None, :], r_mask, t_mask)
        for begin_column in range(0, LATENT, COLUMNS):
            k = begin_column + column
            q_mask, k_mask = real & (k < LATENT)[None, :], seen[:, None] & (k < LATENT)[None, :]
            score += _scores(row + k[None, :], entry + k[None, :], q_mask, k_mask)
        score = score * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        raised = tl.maximum(top, tl.max(score, 1))
        decay = tl.exp(top - raised)
        share = tl.exp(score - raised[:, None])
        total = total * decay + tl.sum(share, 1)
        s_high, s_low = _two_parts(share)
        inside = seen[:, None] & (latent < LATENT)[None, :]
        k_high, k_low = _two_parts(tl.load(entry + latent[None, :], mask=inside, other=0.0))
        part = tl.dot(s_low, k_high)
        part = tl.dot(s_high, k_low, part)
        part = tl.dot(s_high, k_high, part)
        result = result * decay[:, None] + part
        top = raised
    at = (local.to(tl.int64) * splits + split) * heads + head
    tl.store(sums + at[:, None] * LATENT + latent[None, :], result, mask=real & (latent < LATENT)[None, :])
    tl.store(tops + at, top, mask=head < heads)
    tl.store(totals + at, total, mask=head < heads)


@triton.jit
def merge_splits(
    sums, tops, totals, positions, out, first, heads, splits,
    LATENT: tl.constexpr, LATENT_2: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """out [T, H, LATENT] of one query and head a program, the splits added in their order."""
    local, head = tl.program_id(0), tl.program_id(1)
    visible = (tl.load(positions + first + local) + 1).to(tl.int32)
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
        result += value * share
    row = (first + local).to(tl.int64) * heads + head
    tl.store(out + row * LATENT + latent, tl.div_rn(result, total + tl.zeros_like(result)), mask=latent < LATENT)


def mla_attention(q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, rank: int, tile: AttentionTile) -> Tensor:
    """`Kernels.mla_attention`: q [T, H, L + R], pages [num_pages, page_size, L + R] float32 -> [T, H, L]."""
    queries, heads, width = q.shape
    num_pages, page_size, _ = pages.shape
    sequences, max_pages = batch.page_table.shape
    out = torch.empty((queries, heads, rank), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    splits = max(1, min(_MAX_SPLITS, triton.cdiv(max_pages * page_size, tile.split)))
    slice_size = max(1, min(queries, _SCRATCH_BYTES // (4 * splits * heads * rank)))
    sums = torch.empty((slice_size, splits, heads, rank), dtype=torch.float32, device=q.device)
    tops = torch.empty((2, slice_size, splits, heads), dtype=torch.float32, device=q.device)
    latent_2 = max(16, triton.next_power_of_2(rank))
    rope_2 = max(16, triton.next_power_of_2(width - rank)) if width > rank else 16
    for first in range(0, queries, slice_size):
        count = min(slice_size, queries - first)
        attend_split[(count, triton.cdiv(heads, tile.heads), splits)](
            q, pages, batch.query_start, batch.page_table, batch.positions, sums, tops[0], tops[1],
            first, heads, sequences, max_pages, page_size, num_pages, splits, scale,
            rank, width - rank, latent_2, rope_2, triton.next_power_of_2(max(sequences, 1)),
            tile.heads, tile.keys, min(tile.columns, latent_2), tile.split, _MAX_SPLITS,
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
        merge_splits[(count, heads)](
            sums, tops[0], tops[1], batch.positions, out, first, heads, splits,
            rank, latent_2, tile.split, _MAX_SPLITS, num_warps=4 if latent_2 >= 256 else 1,
        )  # fmt: skip
    return out


__all__ = ["AttentionTile", "mla_attention"]
