"""`attention_blocks.attend_blocks` for sm_90 in Gluon, which says itself when things happen: a block's entries are on
their way while the block before is multiplied, where Triton's pipeliner asks for them at the end of a step and waits
for them at the start of the next; products of scores do not wait for each other; sums are added beside products. What
is computed, and in which order, is the same. Nothing interprets Gluon on a CPU.
"""

# Gluon's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import attention_blocks

# Named otherwise from Triton 3.9 on.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_power, _unit = gluon.jit(attention_blocks._power.fn), gluon.jit(attention_blocks._unit.fn)
_FAR: gl.constexpr = gl.constexpr(attention_blocks._FAR.value)


@gluon.jit
def _look_up(table, block, visible, page_size, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """Pages of a block's keys, -1 beyond the context."""
    position = block * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    return gl.load(table + position // page_size, mask=position < visible, other=-1)


@gluon.jit
def _ask(
    pages, page, block, begin, page_size, num_pages, to,
    WIDTH: gl.constexpr, KEYS: gl.constexpr, PIECE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Asks for some columns of a block's entries, in pieces."""
    position = block * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    present = ((page >= 0) & (page < num_pages))[:, None]
    entry = pages + (page * page_size + position % page_size).to(gl.int64)[:, None] * WIDTH
    column = begin + gl.arange(0, PIECE, gl.SliceLayout(0, LAYOUT))[None, :]
    for c in gl.static_range(len(to)):
        _copy(to[c], entry + c * PIECE + column, mask=present)


@gluon.jit(do_not_specialize=["page_size"])
def attend_blocks_gluon(
    q, pages, query_start, page_table, positions, out, sums, tops,
    first, sequences, max_pages, page_size, num_pages, places, scale,
    heads: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr, SEQUENCES: gl.constexpr,
    HEADS: gl.constexpr, KEYS: gl.constexpr, PIECE: gl.constexpr, FOLD: gl.constexpr,
    FOLDED: gl.constexpr, UNIT: gl.constexpr, UNITS: gl.constexpr,
):  # fmt: skip
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    # Both groups of four warps have all scores of their 64 heads; each has half of a piece's columns.
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, KEYS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, PIECE // 2, 16])
    SHARES: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PIECES: gl.constexpr = LATENT // PIECE
    WIDTH: gl.constexpr = LATENT + ROPE
    local = gl.num_programs(0) - 1 - gl.program_id(0)
    query = first + local
    visible = gl.maximum((gl.load(positions + query) + 1).to(gl.int32), 1)
    blocks = gl.cdiv(visible, KEYS)
    unit = _unit(blocks, FOLDED, UNIT, UNITS)
    whole = FOLD and blocks <= FOLDED
    if whole:
        unit = blocks
    units = gl.cdiv(blocks, unit)
    SEQ: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    number = gl.arange(0, SEQUENCES, SEQ)
    starts = gl.load(query_start + 1 + number, mask=number < sequences, other=2147483647)
    table = page_table + gl.sum((starts <= query).to(gl.int32), 0) * max_pages

    asked = ()
    latents = ()
    row = query.to(gl.int64) * heads + gl.program_id(1) * HEADS
    head_w = gl.arange(0, HEADS, gl.SliceLayout(1, WIDE))
    column_w = gl.arange(0, PIECE, gl.SliceLayout(0, WIDE))[None, :]
    real_w = (gl.program_id(1) * HEADS + head_w < heads)[:, None]
    for c in gl.static_range(PIECES):
        given = gl.load(q + (row + head_w)[:, None] * WIDTH + c * PIECE + column_w, mask=real_w, other=0.0)
        asked += (gl.allocate_shared_memory(gl.bfloat16, [HEADS, PIECE], SHARED, given),)
        latents += (gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, PIECE], SHARED),)
    head_n = gl.arange(0, HEADS, gl.SliceLayout(1, NARROW))
    column_n = gl.arange(0, ROPE, gl.SliceLayout(0, NARROW))[None, :]
    real_n = (gl.program_id(1) * HEADS + head_n < heads)[:, None]
    given_n = gl.load(q + (row + head_n)[:, None] * WIDTH + LATENT + column_n, mask=real_n, other=0.0)
    asked_rotated = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], SHARED, given_n)
    rotateds = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], SHARED)
    fence_async_shared()

    head = gl.program_id(1) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, VALUES))
    real = (head < heads)[:, None]
    column = gl.arange(0, PIECE, gl.SliceLayout(0, VALUES))[None, :]
    key = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    for at in range(gl.program_id(2), units, gl.num_programs(2)):
        begin = at * unit
        end = gl.minimum(begin + unit, blocks)
        top = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, SCORES))
        values = ()
        for _ in gl.static_range(PIECES):
            values += (gl.zeros([HEADS, PIECE], gl.float32, VALUES),)
        page = _look_up(table, begin, visible, page_size, KEYS, WIDE)
        page_n = _look_up(table, begin, visible, page_size, KEYS, NARROW)
        _barrier()  # a unit before has been read by all
        places_to = ()
        for c in gl.static_range(PIECES):
            places_to += (latents[c].index(0),)
        _ask(pages, page, begin, 0, page_size, num_pages, places_to, WIDTH, KEYS, PIECE, WIDE)
        _ask(pages, page_n, begin, LATENT, page_size, num_pages, (rotateds.index(0),), WIDTH, KEYS, ROPE, NARROW)
        async_copy.commit_group()
        page = _look_up(table, begin + 1, visible, page_size, KEYS, WIDE)
        page_n = _look_up(table, begin + 1, visible, page_size, KEYS, NARROW)
        for block in range(begin, end):
            now = (block - begin) % 2
            async_copy.wait_group(0)
            _barrier()  # entries are here, and the block before has been read by all
            if block + 1 < end:
                places_next = ()
                for c in gl.static_range(PIECES):
                    places_next += (latents[c].index(1 - now),)
                _ask(pages, page, block + 1, 0, page_size, num_pages, places_next, WIDTH, KEYS, PIECE, WIDE)
                to = (rotateds.index(1 - now),)
                _ask(pages, page_n, block + 1, LATENT, page_size, num_pages, to, WIDTH, KEYS, ROPE, NARROW)
                async_copy.commit_group()
            page = _look_up(table, block + 2, visible, page_size, KEYS, WIDE)
            page_n = _look_up(table, block + 2, visible, page_size, KEYS, NARROW)
            score = gl.zeros([HEADS, KEYS], gl.float32, SCORES)
            for c in gl.static_range(PIECES):
                score = warpgroup_mma(
                    asked[c], latents[c].index(now).permute((1, 0)), score, use_acc=c > 0, is_async=True
                )
            score = warpgroup_mma(asked_rotated, rotateds.index(now).permute((1, 0)), score, is_async=True)
            score = warpgroup_mma_wait(0, deps=(score,))
            score = gl.where((block * KEYS + key < visible)[None, :], score * scale, float("-inf"))
            highest = gl.ceil(gl.max(score, 1))
            after = gl.maximum(top, highest)
            decay, weight = _power(top - after), _power(highest - after)
            score = score - highest[:, None]
            share = gl.where(score <= -_FAR, 0.0, gl.exp2(score))
            total = gl.fma(total, decay, gl.sum(share, 1) * weight)
            share = gl.convert_layout((share * weight[:, None]).to(gl.bfloat16), SHARES)
            fade = gl.convert_layout(decay, gl.SliceLayout(1, VALUES))[:, None]
            top = after
            more = ()
            nothing = gl.zeros([HEADS, PIECE], gl.float32, VALUES)
            part = warpgroup_mma(share, latents[0].index(now), nothing, use_acc=False, is_async=True)
            for c in gl.static_range(1, PIECES):
                next_part = warpgroup_mma(share, latents[c].index(now), nothing, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(1, deps=(part,))
                more += (gl.fma(values[c - 1], fade + gl.zeros_like(part), part),)
                part = next_part
            part = warpgroup_mma_wait(0, deps=(part,))
            more += (gl.fma(values[PIECES - 1], fade + gl.zeros_like(part), part),)
            values = more
        if whole:
            sum_of = gl.convert_layout(total, gl.SliceLayout(1, VALUES))[:, None]
            target = out + (query.to(gl.int64) * heads + head)[:, None] * LATENT
            for c in gl.static_range(PIECES):
                gl.store(
                    target + c * PIECE + column, gl.div_rn(values[c], sum_of + gl.zeros_like(values[c])), mask=real
                )
        else:
            place = (local.to(gl.int64) * places + at) * heads + head
            target = sums + place[:, None] * LATENT
            for c in gl.static_range(PIECES):
                gl.store(target + c * PIECE + column, values[c], mask=real)
            gl.store(tops + 2 * place, gl.convert_layout(top, gl.SliceLayout(1, VALUES)), mask=head < heads)
            gl.store(tops + 2 * place + 1, gl.convert_layout(total, gl.SliceLayout(1, VALUES)), mask=head < heads)
