"""Sorts (token, expert) pairs by expert into blocks that one program multiplies, without a word to the host."""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_ONE_PROGRAM = 4096
"""Up to so many pairs one program sorts them all in one launch."""
_CHUNK = 1024


@dataclass(frozen=True)
class PairBlocks:
    """P pairs in blocks of one expert each. Which pair stands where in its expert's blocks is not defined.

    order: [blocks * size] int32 numbers of pairs, P in unused places. expert: [blocks] int32, -1 where none is left.
    """

    order: Tensor
    expert: Tensor
    size: int


@triton.jit
def _counts(pair_expert, begin, pairs, experts, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """How many of a chunk's pairs each expert has, [EXPERTS]; numbers outside 0..experts - 1 count nowhere."""
    at = begin + tl.arange(0, CHUNK)
    expert = tl.load(pair_expert + at, mask=at < pairs, other=experts)
    expert = tl.where((expert < 0) | (expert > experts), experts, expert)
    return tl.histogram(expert, EXPERTS)


@triton.jit
def _place(counts, cursor, block_expert, experts, EXPERTS: tl.constexpr, SIZE: tl.constexpr):
    """Gives each expert its blocks: their first place to `cursor` [experts], their expert to `block_expert`."""
    expert = tl.arange(0, EXPERTS)
    blocks = tl.where(expert < experts, (counts + SIZE - 1) // SIZE, 0)
    first = tl.cumsum(blocks, 0) - blocks
    tl.store(cursor + expert, first * SIZE, mask=expert < experts)
    for block in range(tl.max(blocks, 0)):
        tl.store(block_expert + first + block, expert, mask=block < blocks)


@triton.jit
def _scatter(pair_expert, cursor, order, begin, pairs, experts, CHUNK: tl.constexpr):
    pair = begin + tl.arange(0, CHUNK)
    expert = tl.load(pair_expert + pair, mask=pair < pairs, other=-1)
    known = (expert >= 0) & (expert < experts)
    place = tl.atomic_add(cursor + expert, 1, mask=known, sem="relaxed")
    tl.store(order + place, pair, mask=known)


@triton.jit
def _clear(order, block_expert, pairs, first, step, blocks, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    for begin in range(first * CHUNK, blocks * SIZE, step * CHUNK):
        at = begin + tl.arange(0, CHUNK)
        tl.store(order + at, pairs, mask=at < blocks * SIZE)
        tl.store(block_expert + at, -1, mask=at < blocks)


@triton.jit
def group_at_once(
    pair_expert, order, block_expert, cursor, pairs, experts, blocks,
    EXPERTS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The whole sorting in one program. EXPERTS: a power of 2 above `experts`."""
    _clear(order, block_expert, pairs, 0, 1, blocks, SIZE, CHUNK)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for begin in range(0, pairs, CHUNK):
        counts += _counts(pair_expert, begin, pairs, experts, EXPERTS, CHUNK)
    tl.debug_barrier()
    _place(counts, cursor, block_expert, experts, EXPERTS, SIZE)
    tl.debug_barrier()
    for begin in range(0, pairs, CHUNK):
        _scatter(pair_expert, cursor, order, begin, pairs, experts, CHUNK)


@triton.jit
def count_pairs(
    pair_expert, order, block_expert, counts, pairs, experts, blocks,
    EXPERTS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """First of three launches for many pairs: clears the blocks, adds to `counts` [EXPERTS], which are zeros before."""
    _clear(order, block_expert, pairs, tl.program_id(0), tl.num_programs(0), blocks, SIZE, CHUNK)
    found = _counts(pair_expert, tl.program_id(0) * CHUNK, pairs, experts, EXPERTS, CHUNK)
    tl.atomic_add(counts + tl.arange(0, EXPERTS), found, mask=found > 0, sem="relaxed")


@triton.jit
def place_blocks(counts, cursor, block_expert, experts, EXPERTS: tl.constexpr, SIZE: tl.constexpr):
    """Second, one program."""
    _place(tl.load(counts + tl.arange(0, EXPERTS)), cursor, block_expert, experts, EXPERTS, SIZE)


@triton.jit
def scatter_pairs(pair_expert, cursor, order, pairs, experts, CHUNK: tl.constexpr):
    """Third."""
    _scatter(pair_expert, cursor, order, tl.program_id(0) * CHUNK, pairs, experts, CHUNK)


def group_pairs(pair_expert: Tensor, experts: int, size: int) -> PairBlocks:
    """pair_expert [P] int32 -> blocks of `size` places, as many as P pairs can need. Pairs whose expert is outside
    0..experts - 1 are in no block."""
    pairs, device = pair_expert.shape[0], pair_expert.device
    blocks = pairs // size + min(pairs, experts)
    order = torch.empty(blocks * size, dtype=torch.int32, device=device)
    expert = torch.empty(blocks, dtype=torch.int32, device=device)
    bins = triton.next_power_of_2(experts + 1)
    cursor = torch.empty(bins, dtype=torch.int32, device=device)
    if pairs <= _ONE_PROGRAM:
        group_at_once[(1,)](pair_expert, order, expert, cursor, pairs, experts, blocks, bins, size, _CHUNK, num_warps=8)
        return PairBlocks(order, expert, size)
    counts, chunks = torch.zeros(bins, dtype=torch.int32, device=device), triton.cdiv(pairs, _CHUNK)
    count_pairs[(chunks,)](pair_expert, order, expert, counts, pairs, experts, blocks, bins, size, _CHUNK)
    place_blocks[(1,)](counts, cursor, expert, experts, bins, size)
    scatter_pairs[(chunks,)](pair_expert, cursor, order, pairs, experts, _CHUNK)
    return PairBlocks(order, expert, size)


__all__ = ["PairBlocks", "group_pairs"]
