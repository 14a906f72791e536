"""Which entries each query sees, as lists of slots behind one another, made on the device in one launch."""

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

_BLOCK = 2048


@dataclass(frozen=True)
class KeyLists:
    """N sequences of one query each, all tensors int32, as AITER's MLA takes them with pages of one token.

    queries: [N + 1], 0..N. starts: [N + 1], where each sequence's list begins, and where the last one ends. slots: the
    lists; what stands behind the last one means nothing. last_lengths: [N], how much of each last page is used: 1.
    splits: [N + 1], where each sequence's splits begin.
    """

    queries: Tensor
    starts: Tensor
    slots: Tensor
    last_lengths: Tensor
    splits: Tensor


@triton.jit
def list_keys(
    positions, query_start, page_table, queries, starts, slots, last_lengths, splits, first, rows, sequences,
    max_pages, page_size,
    COPIES: tl.constexpr, COPIES_2: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, part of its list): the query first + row, whose list is written COPIES times. ROWS and SEQUENCES:
    powers of 2 that hold `rows` and `sequences`."""
    row, part = tl.program_id(0), tl.program_id(1)
    other = tl.arange(0, ROWS)
    seen = tl.load(positions + first + other, mask=other < rows, other=-1).to(tl.int32) + 1
    seen = tl.minimum(tl.maximum(seen, 0), max_pages * page_size)
    mine = tl.sum(tl.where(other == row, seen, 0), 0)
    start = tl.sum(tl.where(other < row, seen, 0), 0) * COPIES
    sequence = tl.arange(0, SEQUENCES)
    ends = tl.load(query_start + 1 + sequence, mask=sequence < sequences, other=2147483647)
    owner = tl.minimum(tl.sum((ends <= first + row).to(tl.int32), 0), sequences - 1)
    key = part * BLOCK + tl.arange(0, BLOCK)
    inside = key < mine
    page = tl.load(page_table + owner * max_pages + key // page_size, mask=inside, other=0)
    slot = tl.maximum(page, 0) * page_size + key % page_size
    for copy in tl.static_range(COPIES):
        tl.store(slots + start + copy * mine + key, slot, mask=inside)
    if part == 0:
        copies = tl.arange(0, COPIES_2)
        known = copies < COPIES
        place = row * COPIES + copies
        tl.store(queries + place, place, mask=known)
        tl.store(starts + place, start + copies * mine, mask=known)
        tl.store(splits + place, place * SPLITS, mask=known)
        tl.store(last_lengths + place, tl.full([COPIES_2], 1, tl.int32), mask=known)
        if row == rows - 1:
            end = rows * COPIES
            tl.store(queries + end, end)
            tl.store(starts + end, start + COPIES * mine)
            tl.store(splits + end, end * SPLITS)


def key_lists(batch: PagedBatch, rows: slice, page_size: int, copies: int, splits: int) -> KeyLists:
    """Of the queries `rows`, each `copies` times, one after the other. Pages of 1 token, for not every release counts
    larger ones rightly. A position beyond the page table sees all that the table has; an unused entry is page 0."""
    table, device, count = batch.page_table, batch.positions.device, rows.stop - rows.start
    many, capacity = count * copies, table.shape[1] * page_size

    def integers(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    lists = KeyLists(
        integers(many + 1), integers(many + 1), integers(many * capacity), integers(many), integers(many + 1)
    )
    list_keys[(count, max(1, triton.cdiv(capacity, _BLOCK)))](
        batch.positions, batch.query_start, table, lists.queries, lists.starts, lists.slots, lists.last_lengths,
        lists.splits, rows.start, count, len(table), table.shape[1], page_size,
        copies, triton.next_power_of_2(copies), splits, triton.next_power_of_2(count),
        triton.next_power_of_2(len(table)), _BLOCK,
    )  # fmt: skip
    return lists


__all__ = ["KeyLists", "key_lists", "list_keys"]
