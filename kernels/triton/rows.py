"""Operations on rows: norm, rotary embedding, SiLU, weighted slots, KV entries."""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import ordered_silu

_BLOCK = 1024


@triton.jit
def rms_norm_rows(x, weight, out, size, eps, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < size
    value = tl.load(x + row * size + column, mask=inside, other=0.0)
    mean = tl.div_rn(tl.sum(value * value, 0), size * 1.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, value * inverse * factor, mask=inside)


@triton.jit
def rope_rows(x, positions, cos, sin, out, pairs, half, length, PAIRS: tl.constexpr):
    """`pairs` = H * R / 2 pairs of one token a program; a position outside the tables gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    inside = pair < pairs
    position = tl.load(positions + row)
    known = inside & (position >= 0) & (position < length)
    angle = position * half + pair % half
    c = tl.load(cos + angle, mask=known, other=float("nan"))
    s = tl.load(sin + angle, mask=known, other=float("nan"))
    at = (row * pairs + pair) * 2
    even = tl.load(x + at, mask=inside, other=0.0)
    odd = tl.load(x + at + 1, mask=inside, other=0.0)
    tl.store(out + at, even * c - odd * s, mask=inside)
    tl.store(out + at + 1, even * s + odd * c, mask=inside)


@triton.jit
def copy_rows(table, rows, out, size, length, BLOCK: tl.constexpr):
    """Row rows[t] of table [length, size] to row t of out, NaN for one outside the table; program (t, columns)."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = (column < size) & (source >= 0) & (source < length)
    value = tl.load(table + source * size + column, mask=known, other=float("nan")).to(tl.float32)
    tl.store(out + row * size + column, value, mask=column < size)


@triton.jit
def silu_mul_rows(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0)
    tl.store(out + row * size + column, ordered_silu(gate) * up, mask=inside)


@triton.jit
def combine_slots(slots, weights, shared, residual, out, size, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        value = tl.load(slots + (row * TOP_K + slot) * size + column, mask=inside, other=0.0)
        total += value * tl.load(weights + row * TOP_K + slot)
    total += tl.load(shared + row * size + column, mask=inside, other=0.0)
    total = tl.load(residual + row * size + column, mask=inside, other=0.0) + total
    tl.store(out + row * size + column, total, mask=inside)


@triton.jit
def write_entries(pages, slots, latent, k_rope, rank, rope, limit, SIZE: tl.constexpr):
    """One token a program; a slot outside the pages is not written."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    column = tl.arange(0, SIZE)
    low = tl.load(latent + row * rank + column, mask=column < rank, other=0.0)
    high = tl.load(k_rope + row * rope + column - rank, mask=(column >= rank) & (column < rank + rope), other=0.0)
    inside = (column < rank + rope) & (slot >= 0) & (slot < limit)
    tl.store(pages + slot * (rank + rope) + column, tl.where(column < rank, low, high), mask=inside)


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows [T] int64 of table [N, D] -> [T, D] float32."""
    (length, size), count = table.shape, rows.shape[0]
    out = torch.empty((count, size), dtype=torch.float32, device=table.device)
    if out.numel():
        copy_rows[(count, triton.cdiv(size, _BLOCK))](table, rows, out, size, length, _BLOCK)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    tokens, size = x.shape
    out = torch.empty_like(x)
    if tokens:
        width = triton.next_power_of_2(size)
        warps = min(max(width // 512, 1), 8)
        rms_norm_rows[(tokens,)](x, weight, out, size, eps, width, num_warps=warps, enable_fp_fusion=False)
    return out


def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tokens, heads, size = x.shape
    out = torch.empty_like(x)
    if x.numel():
        pairs = heads * size // 2
        width = triton.next_power_of_2(pairs)
        rope_rows[(tokens,)](x, positions, cos, sin, out, pairs, size // 2, cos.shape[0], width, enable_fp_fusion=False)
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=torch.float32, device=gate_up.device)
    if out.numel():
        silu_mul_rows[(tokens, triton.cdiv(size, _BLOCK))](gate_up, out, size, _BLOCK, enable_fp_fusion=False)
    return out


def combine(slots: Tensor, weights: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    tokens, top_k, size = slots.shape
    out = torch.empty((tokens, size), dtype=torch.float32, device=slots.device)
    if out.numel():
        grid = (tokens, triton.cdiv(size, _BLOCK))
        combine_slots[grid](slots, weights, shared, residual, out, size, top_k, _BLOCK, enable_fp_fusion=False)
    return out


def write_kv(pages: Tensor, slots: Tensor, latent: Tensor, k_rope: Tensor) -> None:
    tokens, rank = latent.shape
    if tokens:
        width, limit = triton.next_power_of_2(rank + k_rope.shape[1]), pages.shape[0] * pages.shape[1]
        write_entries[(tokens,)](pages, slots, latent, k_rope, rank, k_rope.shape[1], limit, width)


__all__ = ["combine", "rms_norm", "rope", "silu_mul", "take_rows", "write_kv"]
