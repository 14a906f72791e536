"""Attention of a prompt's chunk with a key and a value for each head, expanded from the latents in pages.

A sequence's context is taken in slices, so that what is expanded has a bound: entries are gathered from pages as
bfloat16, a library's product makes keys and values of all heads of them, and a flash attention adds the slice to the
sums of the queries. Queries are rotated and rounded where they are read, and a rotated key is one for all heads.
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

from ..checks import ExpandedShapes
from ..kv_entries import ROUNDED, EntryLayout
from ..protocol import Chunk, PagedBatch
from .arithmetic import from_e4m3

_LOG2_E = 1.4426950408889634
_GATHERED = 8
"""Entries of a program that gathers them."""


@dataclass(frozen=True)
class ExpandedTile:
    """rows, keys: of a program's products. slice: entries that are expanded at once; at Kimi-K2.5's sizes each takes
    32 KiB. cached: bytes of keys and values that programs running at once should share, of a GPU's L2."""

    rows: int
    keys: int
    warps: int
    stages: int
    slice: int = 8192
    cached: int = 24 << 20


def expanded_tile(gpu: str) -> ExpandedTile:
    """gpu: by `tiles.gpu_name`. A gfx942's programs have 64 KiB of LDS."""
    if gpu.startswith("gfx"):
        return ExpandedTile(128, 32, 4, 1)
    return ExpandedTile(128, 64, 8, 2)


@triton.jit(do_not_specialize=["begin", "count", "page_size", "num_pages"])
def gather_entries(
    pages, keys, scales, table, out, begin, count, page_size, num_pages,
    RANK: tl.constexpr, RANK_2: tl.constexpr, ROPE: tl.constexpr, ROPE_2: tl.constexpr,
    ROUNDED: tl.constexpr, ENTRY: tl.constexpr, KEY_AT: tl.constexpr, SCALE_AT: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out [count, RANK + ROPE]: the entries from `begin` on of the sequence whose pages `table` names. pages, keys,
    scales, ROUNDED, ENTRY, KEY_AT, SCALE_AT: as of `attention.attend_splits`. An entry without a page becomes NaN."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < count
    position = begin + token
    page = tl.load(table + position // page_size, mask=inside, other=-1)
    present = (page >= 0) & (page < num_pages)
    slot = (page * page_size + position % page_size).to(tl.int64)
    column, turned = tl.arange(0, RANK_2)[None, :], tl.arange(0, ROPE_2)[None, :]
    latent = tl.load(pages + slot[:, None] * ENTRY + column, mask=present[:, None] & (column < RANK), other=0)
    if ROUNDED:
        size = tl.load(scales + slot * (ENTRY // 4) + SCALE_AT, mask=present, other=0.0)
        if ROUNDED == 2:
            latent, size = from_e4m3(latent), size * 256.0
        latent = latent.to(tl.float32) * size[:, None]
        key = keys + slot[:, None] * (ENTRY // 2)
    else:
        key = keys + slot[:, None] * ENTRY
    rotated = tl.load(key + KEY_AT + turned, mask=present[:, None] & (turned < ROPE), other=0.0)
    latent = tl.where(present[:, None], latent.to(out.dtype.element_ty), float("nan"))
    rotated = tl.where(present[:, None], rotated.to(out.dtype.element_ty), float("nan"))
    row = out + token.to(tl.int64)[:, None] * (RANK + ROPE)
    tl.store(row + column, latent.to(out.dtype.element_ty), mask=inside[:, None] & (column < RANK))
    tl.store(row + RANK + turned, rotated.to(out.dtype.element_ty), mask=inside[:, None] & (turned < ROPE))


@triton.jit
def _rows(base, row, column, real, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr, EVEN: tl.constexpr):
    """Rows of COLUMNS values, zeros for rows that are not real. ALL: that all are; EVEN: that no column is beyond."""
    place = base + row * STRIDE + column
    if EVEN:
        return tl.load(place) if ALL else tl.load(place, mask=real, other=0.0)
    return tl.load(place, mask=(column < COLUMNS) & real, other=0.0)


@triton.jit
def _add_blocks(
    query, turned_query, keys, rotated, values, seen, low, high, count, scale, top, total, value,
    INNER: tl.constexpr, INNER_2: tl.constexpr, TURNED: tl.constexpr, TURNED_2: tl.constexpr, RANK: tl.constexpr,
    VALUE: tl.constexpr, VALUE_2: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums with the entries low..high of a slice. seen: [rows], how many each row sees. WHOLE: that every row sees
    all of them."""
    inner, turned = tl.arange(0, INNER_2)[None, :], tl.arange(0, TURNED_2)[None, :]
    column, number = tl.arange(0, VALUE_2)[None, :], tl.arange(0, KEYS)
    for at in tl.range(low, high, KEYS, num_stages=STAGES):
        entry = at + number
        real = (entry < count)[:, None]
        key = _rows(keys, entry[:, None], inner, real, INNER, INNER, WHOLE, INNER == INNER_2)
        turn = _rows(rotated, entry[:, None], turned, real, RANK + TURNED, TURNED, WHOLE, TURNED == TURNED_2)
        score = tl.dot(query, key.T)
        score = tl.dot(turned_query, turn.T, score)
        if not WHOLE:
            score = tl.where(entry[None, :] < seen[:, None], score, float("-inf"))
        after = tl.maximum(top, tl.max(score, 1) * scale)
        decay = tl.exp2(top - after)
        share = tl.exp2(score * scale - after[:, None])
        total = total * decay + tl.sum(share, 1)
        value = value * decay[:, None]
        some = _rows(values, entry[:, None], column, real, VALUE, VALUE, WHOLE, VALUE == VALUE_2)
        value = tl.dot(share.to(some.dtype), some, value)
        top = after
    return top, total, value


@triton.jit(do_not_specialize=["first", "rows", "past", "begin", "count", "length", "together"])
def attend_expanded(
    q, positions, cos, sin, keys, rotated, values, out, tops,
    first, rows, past, begin, count, length, together, scale,
    heads: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr, INNER_2: tl.constexpr, PAIRS: tl.constexpr,
    PAIRS_2: tl.constexpr, VALUE: tl.constexpr, VALUE_2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SLICED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS queries of a chunk and one head a program, over the `count` entries from `begin` on.

    q [T, heads, INNER + 2 * PAIRS] float32, keys [heads, count, INNER], values [heads, count, VALUE], rotated: of the
    entries, RANK + 2 * PAIRS values apart. The chunk's queries are `first` and the `rows` - 1 behind it, of which the
    first sees past + 1 entries. out [T, heads * VALUE] float32; SLICED: the context has several slices: until a query's
    last one `out` has its unnormalized sums, and tops [rows, heads, 2] its largest score and sum of shares. scale: of
    powers of 2, > 0. Programs with the longest rows come first, `together` heads at a time.
    """
    tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    group, rest = program // (tiles * together), program % (tiles * together)
    head = group * together + rest % together
    local = (tiles - 1 - rest // together) * ROWS
    high = tl.minimum(past + tl.minimum(local + ROWS, rows) - begin, count)
    if (head >= heads) | (high <= 0):
        return
    index = local + tl.arange(0, ROWS)
    real = (index < rows)[:, None]
    row = (first + index).to(tl.int64)
    source = q + (row * heads + head)[:, None] * (INNER + 2 * PAIRS)
    inner = tl.arange(0, INNER_2)[None, :]
    dtype: tl.constexpr = keys.dtype.element_ty
    query = tl.load(source + inner, mask=real & (inner < INNER), other=0.0).to(dtype)
    pair, turned = tl.arange(0, PAIRS_2)[None, :], tl.arange(0, 2 * PAIRS_2)[None, :]
    position = tl.load(positions + row, mask=index < rows, other=0)[:, None]
    used = real & (pair < PAIRS)
    known = used & (position >= 0) & (position < length)
    c = tl.where(used, tl.load(cos + position * PAIRS + pair, mask=known, other=float("nan")), 0.0)
    s = tl.where(used, tl.load(sin + position * PAIRS + pair, mask=known, other=float("nan")), 0.0)
    unturned = tl.load(source + INNER + turned, mask=real & (turned < 2 * PAIRS), other=0.0)
    even, odd = tl.split(unturned.reshape(ROWS, PAIRS_2, 2))
    turned_query = tl.join(even * c - odd * s, even * s + odd * c).reshape(ROWS, 2 * PAIRS_2).to(dtype)
    column = tl.arange(0, VALUE_2)[None, :]
    target = out + (row * heads + head)[:, None] * VALUE + column
    inside = real & (column < VALUE)
    place = tops + 2 * (index.to(tl.int64) * heads + head)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    value = tl.zeros((ROWS, VALUE_2), tl.float32)
    if SLICED:
        later = index < tl.where(begin > 0, rows, 0)
        top = tl.load(place, mask=later, other=float("-inf"))
        total = tl.load(place + 1, mask=later, other=0.0)
        value = tl.load(target, mask=later[:, None] & (column < VALUE), other=0.0)
    keys += head.to(tl.int64) * count * INNER
    values += head.to(tl.int64) * count * VALUE
    seen = tl.minimum(past + index + 1 - begin, count)
    whole = tl.maximum(tl.minimum(past + local + 1 - begin, count), 0) // KEYS * KEYS
    top, total, value = _add_blocks(
        query, turned_query, keys, rotated, values, seen, 0, whole, count, scale, top, total, value,
        INNER, INNER_2, 2 * PAIRS, 2 * PAIRS_2, RANK, VALUE, VALUE_2, KEYS, True, STAGES,
    )  # fmt: skip
    top, total, value = _add_blocks(
        query, turned_query, keys, rotated, values, seen, whole, high, count, scale, top, total, value,
        INNER, INNER_2, 2 * PAIRS, 2 * PAIRS_2, RANK, VALUE, VALUE_2, KEYS, False, STAGES,
    )  # fmt: skip
    if SLICED:
        tl.store(place, top, mask=index < rows)
        tl.store(place + 1, total, mask=index < rows)
        last = past + tl.minimum(local + ROWS, rows) <= begin + count
        total = tl.where(last, total, 1.0)
    tl.store(target, value / total[:, None], mask=inside)


def expanded_attention(
    q: Tensor,
    pages: Tensor,
    batch: PagedBatch,
    chunk: Chunk,
    up_key: Tensor,
    up_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    out: Tensor,
    shapes: ExpandedShapes,
    tile: ExpandedTile,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """`ExpandingKernels.expanded_attention`. pages: bfloat16, or of `kv_entries.ROUNDED`. dtype: of latents, keys,
    values, and of what they are multiplied with."""
    past, heads = chunk.context - chunk.rows, shapes.heads
    size = min(chunk.context, tile.slice)
    sliced = size < chunk.context
    entries = torch.empty((size, shapes.rank + shapes.rope), dtype=dtype, device=q.device)
    tops = torch.empty((chunk.rows if sliced else 0, heads, 2), dtype=torch.float32, device=q.device)
    up = up_key.to(dtype), up_value.to(dtype).mT
    inner_2, value_2 = (max(16, triton.next_power_of_2(each)) for each in (shapes.inner, shapes.value))
    pairs_2 = max(8, triton.next_power_of_2(shapes.rope // 2))
    tiles = triton.cdiv(chunk.rows, tile.rows)
    together = max(1, min(heads, tile.cached // (size * (shapes.inner + shapes.value) * dtype.itemsize)))
    for begin in range(0, chunk.context, size):
        some = entries[: min(size, chunk.context - begin)]
        _gather(pages, batch.page_table[chunk.sequence], begin, some, shapes)
        latents = some[:, : shapes.rank].expand(heads, -1, -1)
        keys, values = (torch.bmm(latents, each) for each in up)
        attend_expanded[(triton.cdiv(heads, together) * together * tiles,)](
            q, batch.positions, cos, sin, keys, some[:, shapes.rank :], values, out, tops,
            chunk.first, chunk.rows, past, begin, len(some), len(cos), together, scale * _LOG2_E,
            heads, shapes.rank, shapes.inner, inner_2, shapes.rope // 2, pairs_2, shapes.value, value_2,
            tile.rows, tile.keys, sliced, tile.stages,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _gather(pages: Tensor, table: Tensor, begin: int, out: Tensor, shapes: ExpandedShapes) -> None:
    """The entries from `begin` on of the sequence with these pages -> out [count, L + R]."""
    num_pages, page_size, entry = pages.shape
    count, views, places, kind = len(out), (pages, pages, pages), (shapes.rank, 0), 0
    if pages.dtype in ROUNDED:
        layout, kind = EntryLayout.of(shapes.rank, shapes.rope), 1 if pages.dtype is torch.int8 else 2
        codes, places = pages if kind == 1 else pages.view(torch.uint8), (layout.key // 2, layout.scale // 4)
        views = codes, pages.view(torch.bfloat16), pages.view(torch.float32)
    gather_entries[(triton.cdiv(count, _GATHERED),)](
        *views, table, out, begin, count, page_size, num_pages,
        shapes.rank, triton.next_power_of_2(shapes.rank), shapes.rope, triton.next_power_of_2(shapes.rope),
        kind, entry, *places, _GATHERED, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


__all__ = ["ExpandedTile", "expanded_attention", "expanded_tile"]
