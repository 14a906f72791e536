"""Absorbed latent attention over pages. A query's context is cut into splits that its own length alone decides, and a
second kernel merges them in order: its bits are the same in decode, in prefill and in any chunk. Entries are read for
scores and again for values, in pieces; where registers and shared memory allow it, `attention_blocks` reads them once.

Pages of bfloat16 are multiplied as they are, all heads of a query in one program, queries and shares rounded to
bfloat16 too: 2^-8 of a product at most. Words of float32 pages hold an entry as two bfloat16 parts, and so are queries
and shares taken: the product of two second parts is left out, 2^-18 at most (`Kernels.splits_floats`). Codes in pages
of 8 bits are bfloat16 exactly; an entry's scale multiplies its scores and its share.
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

from ..kv_entries import EntryLayout
from ..protocol import PagedBatch
from .arithmetic import exact_bfloat, from_e4m3, two_parts
from .attention_blocks import BlockTile, attend

_LOG2_E = 1.4426950408889634
_SM_90 = frozenset({"sm_90", "H20", "H100", "H200", "H800", "GH200"})
"""The architecture, and words of names such as "NVIDIA H200"."""
_MAX_SPLITS = 64
_PROGRAMS = 528
"""Splits of a query run one after another in a program where that still leaves so many: four a multiprocessor."""
_SCRATCH_BYTES = 1 << 29
"""Queries run in slices whose unmerged splits take no more than this."""


@dataclass(frozen=True)
class AttentionTile:
    """heads: of one query a program takes. keys: of a split, while that makes no more than `_MAX_SPLITS` of them.
    columns: of an entry a step of the products takes."""

    heads: int
    keys: int
    columns: int
    warps: int
    stages: int


def attention_tile(kv_dtype: torch.dtype, gpu: str) -> AttentionTile | BlockTile:
    """gpu: by `tiles.gpu_name`. Queries and two blocks of bfloat16 entries fit into a multiprocessor of sm_90, and of
    no other GPU that is known here; a gfx942's programs have 64 KiB of LDS."""
    exact = kv_dtype is torch.float32
    if gpu.startswith("gfx"):
        return AttentionTile(16, 128, 32, 4, 1) if exact else AttentionTile(64, 64, 64, 8, 1)
    if exact:
        return AttentionTile(16, 128, 32, 4, 1)
    if kv_dtype is torch.bfloat16:
        return AttentionTile(64, 256, 64, 4, 2) if _SM_90.isdisjoint(gpu.split()) else BlockTile()
    return AttentionTile(64, 128, 64, 4, 2)


@triton.jit
def _parts(value, PARTS: tl.constexpr, dtype: tl.constexpr):
    """value as one number of `dtype`, given twice, or as the sum of two bfloat16."""
    if PARTS == 2:
        return two_parts(value)
    high = value.to(dtype)
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
def _split_length(visible, KEYS: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Keys a split of a context of `visible` tokens: a multiple of KEYS."""
    return KEYS * ((visible + KEYS * MAX_SPLITS - 1) // (KEYS * MAX_SPLITS))


@triton.jit
def _columns(entry, begin, column, real, ALL: tl.constexpr, LIMIT: tl.constexpr, EVEN: tl.constexpr):
    """Some columns of rows, zeros for rows that are not real and beyond LIMIT. ALL, EVEN: that there are none such."""
    if EVEN:
        return tl.load(entry + begin + column) if ALL else tl.load(entry + begin + column, mask=real, other=0.0)
    return tl.load(entry + begin + column, mask=real & (begin + column < LIMIT), other=0.0)


@triton.jit
def _latents(entry, begin, column, present, ROUNDED: tl.constexpr, dtype: tl.constexpr, LIMIT: tl.constexpr,
             EVEN: tl.constexpr):  # fmt: skip
    """`_columns` of entries; of codes what they stand for, of FP8 2^-8 of it."""
    value = _columns(entry, begin, column, present, False, LIMIT, EVEN)
    if ROUNDED == 0:
        return value
    if ROUNDED == 2:
        value = from_e4m3(value)
    return exact_bfloat(value.to(tl.float32)) if dtype == tl.bfloat16 else value.to(dtype)


# A page size known to be a multiple of 16 made Triton 3.6 assume aligned entries of any width.
@triton.jit(do_not_specialize=["page_size"])
def attend_splits(
    q, pages, keys, scales, query_start, page_table, positions, sums, tops,
    first, sequences, max_pages, page_size, num_pages, splits, scale,
    heads: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, ROPE_2: tl.constexpr, SEQUENCES: tl.constexpr,
    PARTS: tl.constexpr, ROUNDED: tl.constexpr, ENTRY: tl.constexpr, KEY_AT: tl.constexpr, SCALE_AT: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, MAX_SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some splits of one query for HEADS heads; program (query, heads, z) takes an equal run of splits, the z-th.

    pages: bfloat16, PARTS values for each of an entry's; or INT8 (ROUNDED 1) or FP8 (2) as `kv_entries` says. keys and
    scales: the same memory in the dtypes of an entry's key and scale, which begin at KEY_AT and SCALE_AT. ENTRY: values
    from one entry of pages to the next. sums [queries, splits, H, LATENT] of q's dtype and tops [queries, splits, H, 2]
    float32: unnormalized values, largest score and sum of shares of each split. scale: of powers of 2. A split of more
    than KEYS entries is added up in `sums`. The scores of KEYS entries are in registers at once, so that both products
    read entries in pieces of COLUMNS.
    """
    local = tl.program_id(0)
    query = first + local
    visible = tl.maximum((tl.load(positions + query) + 1).to(tl.int32), 1)
    length = _split_length(visible, KEYS, MAX_SPLITS)
    run = length * tl.cdiv(tl.cdiv(visible, length), tl.num_programs(2))
    begin = tl.program_id(2) * run
    if begin >= visible:
        return
    end = tl.minimum(begin + run, visible)
    number = tl.arange(0, SEQUENCES)
    starts = tl.load(query_start + 1 + number, mask=number < sequences, other=2147483647)
    table = page_table + tl.sum((starts <= query).to(tl.int32), 0) * max_pages
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = (head < heads)[:, None]
    column, turned = tl.arange(0, COLUMNS)[None, :], tl.arange(0, ROPE_2)[None, :]
    WIDTH: tl.constexpr = LATENT + ROPE
    dtype: tl.constexpr = tl.bfloat16 if PARTS == 2 else q.dtype.element_ty
    EVEN: tl.constexpr = LATENT % COLUMNS == 0
    WHOLE: tl.constexpr = heads % HEADS == 0
    row = q + (query.to(tl.int64) * heads + head)[:, None] * WIDTH
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    for at in range(begin, end, KEYS):
        split = at // length
        fresh = at % length == 0
        position = at + tl.arange(0, KEYS)
        page = tl.load(table + position // page_size, mask=position < end, other=-1)
        seen = (page >= 0) & (page < num_pages)
        slot = (page * page_size + position % page_size).to(tl.int64)
        entry = pages + slot[:, None] * ENTRY
        key = keys + slot[:, None] * (ENTRY // 2) if ROUNDED else entry
        # Not read again as another entry, to save the masks: one row that all programs read took 40 % longer.
        present = seen[:, None]
        score = tl.zeros((HEADS, KEYS), tl.float32)
        for c in tl.range(0, LATENT, COLUMNS, num_stages=STAGES):
            a, a_low = _parts(_columns(row, c, column, real, WHOLE, LATENT, EVEN), PARTS, dtype)
            k = _latents(entry, c, column, present, ROUNDED, dtype, LATENT, EVEN)
            k_low = _columns(entry + WIDTH, c, column, present, False, LATENT, EVEN) if PARTS == 2 else k
            score = _product(a, a_low, k.T, k_low.T, score, PARTS)
        size = seen.to(tl.float32)
        if ROUNDED:
            size = tl.load(scales + slot * (ENTRY // 4) + SCALE_AT, mask=seen, other=0.0)
            if ROUNDED == 2:
                size *= 256.0
            score *= size[None, :]
        r, r_low = _parts(_columns(row, LATENT, turned, real, WHOLE, WIDTH, ROPE == ROPE_2), PARTS, dtype)
        t = _columns(key, KEY_AT, turned, present, False, KEY_AT + ROPE, ROPE == ROPE_2).to(dtype)
        t_low = t
        if PARTS == 2:
            t_low = _columns(key + WIDTH, KEY_AT, turned, present, False, KEY_AT + ROPE, ROPE == ROPE_2)
        score = _product(r, r_low, t.T, t_low.T, score, PARTS)
        score = score * scale + tl.where(seen, 0.0, float("-inf"))[None, :]
        before = tl.where(fresh, float("-inf"), top)
        top = tl.maximum(before, tl.max(score, 1))
        decay = tl.exp2(before - top)
        share = tl.exp2(score - top[:, None])
        total = tl.where(fresh, 0.0, total * decay) + tl.sum(share, 1)
        if ROUNDED:
            share *= size[None, :]
        s, s_low = _parts(share, PARTS, dtype)
        place = (local.to(tl.int64) * splits + split) * heads + head
        target = sums + place[:, None] * LATENT
        for c in tl.range(0, LATENT, COLUMNS, num_stages=STAGES):
            v = _latents(entry, c, column, present, ROUNDED, dtype, LATENT, EVEN)
            v_low = _columns(entry + WIDTH, c, column, present, False, LATENT, EVEN) if PARTS == 2 else v
            part = _product(s, s_low, v, v_low, tl.zeros((HEADS, COLUMNS), tl.float32), PARTS)
            inside = real & (c + column < LATENT)
            if not fresh:
                part += tl.load(target + c + column, mask=inside, other=0.0).to(tl.float32) * decay[:, None]
            tl.store(target + c + column, part.to(sums.dtype.element_ty), mask=inside)
        tl.store(tops + 2 * place, top, mask=head < heads)
        tl.store(tops + 2 * place + 1, total, mask=head < heads)
        tl.debug_barrier()  # what one thread stored of a split another may read with its next keys


@triton.jit
def merge_splits(
    sums, tops, positions, out, first, heads, splits,
    LATENT: tl.constexpr, LATENT_2: tl.constexpr, KEYS: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """out [T, H, LATENT] of one query and head a program, the splits added in their order."""
    local, head = tl.program_id(0), tl.program_id(1)
    visible = tl.maximum((tl.load(positions + first + local) + 1).to(tl.int32), 1)
    count = tl.cdiv(visible, _split_length(visible, KEYS, MAX_SPLITS))
    at = local.to(tl.int64) * splits * heads + head
    number = tl.arange(0, MAX_SPLITS)
    top = tl.max(tl.load(tops + 2 * (at + number * heads), mask=number < count, other=float("-inf")), 0)
    latent = tl.arange(0, LATENT_2)
    total = 0.0
    result = tl.zeros((LATENT_2,), tl.float32)
    for split in range(count):
        share = tl.exp2(tl.load(tops + 2 * (at + split * heads)) - top)
        total += tl.load(tops + 2 * (at + split * heads) + 1) * share
        value = tl.load(sums + (at + split * heads) * LATENT + latent, mask=latent < LATENT, other=0.0)
        result += value.to(tl.float32) * share
    row = (first + local).to(tl.int64) * heads + head
    tl.store(out + row * LATENT + latent, tl.div_rn(result, total + tl.zeros_like(result)), mask=latent < LATENT)


def mla_attention(
    q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, rank: int, tile: AttentionTile | BlockTile
) -> Tensor:
    """`Kernels.mla_attention`: q [T, H, L + R] float32 or bfloat16, pages [num_pages, page_size, W] as `rows.write_kv`
    writes them -> [T, H, L] float32. With pages in 8 bits products are of q's dtype."""
    queries, heads, width = q.shape
    num_pages, page_size, entry = pages.shape
    sequences, max_pages = batch.page_table.shape
    out = torch.empty((queries, heads, rank), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    if isinstance(tile, BlockTile):
        attend(q.to(pages.dtype), pages, batch, scale, out, tile)
        return out
    rounded = {torch.int8: 1, torch.float8_e4m3fn: 2}.get(pages.dtype, 0)
    parts = 2 if pages.dtype is torch.float32 else 1
    if rounded:
        layout = EntryLayout.of(rank, width - rank)
        places = entry, layout.key // 2, layout.scale // 4
        codes = pages if rounded == 1 else pages.view(torch.uint8)
        views = codes, pages.view(torch.bfloat16), pages.view(torch.float32)
    else:
        q, places = q.to(pages.dtype), (entry * parts, rank, 0)
        views = (pages.view(torch.bfloat16) if parts == 2 else pages,) * 3
    splits = max(1, min(_MAX_SPLITS, triton.cdiv(max_pages * page_size, tile.keys)))
    slice_size = max(1, min(queries, _SCRATCH_BYTES // (q.dtype.itemsize * splits * heads * rank)))
    sums = torch.empty((slice_size, splits, heads, rank), dtype=q.dtype, device=q.device)
    tops = torch.empty((slice_size, splits, heads, 2), dtype=torch.float32, device=q.device)
    latent_2 = triton.next_power_of_2(rank)
    columns, rope_2 = min(tile.columns, max(16, latent_2)), max(16, triton.next_power_of_2(width - rank))
    for first in range(0, queries, slice_size):
        count = min(slice_size, queries - first)
        together = min(splits, triton.next_power_of_2(triton.cdiv(_PROGRAMS, count)))
        attend_splits[(count, triton.cdiv(heads, tile.heads), together)](
            q, *views, batch.query_start, batch.page_table, batch.positions, sums, tops,
            first, sequences, max_pages, page_size, num_pages, splits, scale * _LOG2_E,
            heads, rank, width - rank, rope_2, triton.next_power_of_2(max(sequences, 1)), parts, rounded, *places,
            tile.heads, tile.keys, columns, _MAX_SPLITS, tile.stages,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
        merge_splits[(count, heads)](
            sums, tops, batch.positions, out, first, heads, splits,
            rank, latent_2, tile.keys, _MAX_SPLITS, num_warps=4 if latent_2 >= 256 else 1, enable_fp_fusion=True,
        )  # fmt: skip
    return out


__all__ = ["AttentionTile", "attention_tile", "mla_attention"]
