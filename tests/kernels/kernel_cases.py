"""Inputs for the kernel tests, all from seeds."""

from __future__ import annotations

import torch
from torch import Tensor

from flyray.kernels.kv_entries import ROUNDED, entry_width
from flyray.kernels.protocol import (
    Bf16Matrix,
    ExpertMatrix,
    ExpertWeights,
    Fp8Matrix,
    Int4Matrix,
    Int4Weight,
    Int8Matrix,
    Int8Weight,
    Kernels,
    PagedBatch,
)
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.selfcheck import random_matrix

MATRIX_KINDS: tuple[type[ExpertMatrix], ...] = (Int4Matrix, Int8Matrix, Fp8Matrix, Bf16Matrix)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expert_weights(kind: type[ExpertMatrix], experts: int, hidden: int, inner: int, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    gate_up = random_matrix(kind, experts, 2 * inner, hidden, generator)
    return ExpertWeights(gate_up, random_matrix(kind, experts, hidden, inner, generator))


def int8_weight(outputs: int, inner: int, seed: int = 0) -> Int8Weight:
    """Values over all of int8, -128 too, and scales of several magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (outputs, inner), generator=generator, dtype=torch.int8)
    return Int8Weight(values, 10 ** (torch.rand(outputs, generator=generator) * 6 - 6))


def int4_weight(outputs: int, inner: int, seed: int = 0) -> Int4Weight:
    matrix = random_matrix(Int4Matrix, 1, outputs, inner, torch.Generator().manual_seed(seed))
    assert isinstance(matrix, Int4Matrix)
    return Int4Weight(matrix.nibbles[0], matrix.multipliers[0], matrix.scale[0])


def pairs(tokens: int, experts: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(0, tokens, (count,), generator=generator, dtype=torch.int32)
    return token, torch.randint(0, experts, (count,), generator=generator, dtype=torch.int32)


def paged(queries: list[int], contexts: list[int], page_size: int, spare: int, seed: int) -> tuple[PagedBatch, int]:
    """A batch whose sequences own pages in random order, and the number of pages, `spare` of them nobody's."""
    used = [-(-length // page_size) for length in contexts]
    total = sum(used) + spare
    numbers = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    table = torch.full((len(contexts), max(used, default=0) + 1), -1, dtype=torch.int32)
    taken = 0
    for row, count in enumerate(used):
        table[row, :count] = numbers[taken : taken + count]
        taken += count
    spans = [torch.arange(length - new, length) for new, length in zip(queries, contexts, strict=True)]
    positions = torch.cat([torch.zeros(0, dtype=torch.int64), *spans])
    owner = torch.repeat_interleave(torch.arange(len(queries)), torch.tensor(queries, dtype=torch.int64))
    slots = table[owner, positions // page_size].to(torch.int64) * page_size + positions % page_size
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    return PagedBatch(starts, torch.tensor(contexts, dtype=torch.int32), table, positions, slots), total


def empty_pages(kernels: Kernels, total: int, page_size: int, rank: int, rope: int) -> Tensor:
    """Pages full of NaN, or of bytes that no entry has."""
    pages = torch.empty(total, page_size, entry_width(kernels.kv_dtype, rank, rope), dtype=kernels.kv_dtype)
    pages.view(torch.uint8).fill_(0xFF)
    return pages


def kept(kernels: Kernels, entries: Tensor, rank: int) -> Tensor:
    """What pages of 8 bits keep of entries [..., width], as float64; else the entries."""
    format = ROUNDED.get(kernels.kv_dtype)
    if format is None:
        return entries
    rows = entries.flatten(0, -2)
    latent = ReferenceKernels().quantize(rows[:, :rank].contiguous(), format)
    assert latent.scale is not None
    codes = latent.values.to(torch.float64) * latent.scale[:, None]
    return torch.cat([codes, rows[:, rank:].bfloat16().double()], dim=1).view(entries.shape)


def unchanged(rows: Tensor, rank: int) -> tuple[Tensor, Tensor, float, Tensor, Tensor, Tensor]:
    """What `write_kv` takes besides pages and slots so that rows [T, L + R] are the entries, to the bit: eps is so
    large that a mean of squares below 2^15 changes nothing, and no key is turned."""
    turned = rows.shape[1] - rank
    positions, cos = torch.zeros(len(rows), dtype=torch.int64), torch.ones(1, turned // 2)
    return rows, torch.full((rank,), 2.0**20), 2.0**40, positions, cos, torch.zeros_like(cos)


def cached(kernels: Kernels, entries: Tensor, rank: int) -> Tensor:
    """Pages in the backend's own layout with these entries, [pages, page size, width]."""
    rows = entries.flatten(0, 1)
    pages = empty_pages(kernels, *entries.shape[:2], rank, entries.shape[2] - rank)
    kernels.write_kv(pages, torch.arange(len(rows)), *unchanged(rows, rank))
    return pages


def gathered(pages: Tensor, batch: PagedBatch, sequence: int) -> Tensor:
    """One sequence's cache entries in order, [context, width]."""
    length = int(batch.context_len[sequence])
    used = -(-length // pages.shape[1])
    return pages[batch.page_table[sequence, :used].long()].flatten(0, 1)[:length]
