"""Operations on rows: norm, rotary embedding, SiLU, weighted slots, KV entries."""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import row_stride
from ..kv_entries import ROUNDED, EntryLayout
from ..protocol import ActivationFormat, Activations
from .arithmetic import nearest_bfloat, ordered_silu, two_parts
from .quantize import quantized_row, store_quantized

_BLOCK = 1024


@triton.jit
def rms_norm_rows(x, weight, out, codes, scale, stride, size, eps, SIZE: tl.constexpr, QUANTIZED: tl.constexpr):
    """Rows of x `stride` apart to out [T, size], and where QUANTIZED in INT8 to codes and scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < size
    value = tl.load(x + row * stride + column, mask=inside, other=0.0)
    mean = tl.div_rn(tl.sum(value * value, 0), size * 1.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value = value * inverse * factor
    tl.store(out + row * size + column, value, mask=inside)
    if QUANTIZED:
        store_quantized(value, row * size + column, inside, codes, scale, row, False)


@triton.jit
def rope_rows(x, positions, cos, sin, out, stride, pairs, half, length, PAIRS: tl.constexpr):
    """`pairs` = H * R / 2 pairs of one token a program, whose values of H heads start `stride` apart; a position
    outside the tables gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    inside = pair < pairs
    position = tl.load(positions + row)
    known = inside & (position >= 0) & (position < length)
    angle = position * half + pair % half
    c = tl.load(cos + angle, mask=known, other=float("nan"))
    s = tl.load(sin + angle, mask=known, other=float("nan"))
    even = tl.load(x + row * stride + pair * 2, mask=inside, other=0.0)
    odd = tl.load(x + row * stride + pair * 2 + 1, mask=inside, other=0.0)
    at = (row * pairs + pair) * 2
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
def write_entries(pages, slots, latent, k_rope, rank, rope, limit, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """One token a program, its entry as PARTS times its width of bfloat16; a slot outside the pages is not written."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    column = tl.arange(0, SIZE)
    low = tl.load(latent + row * rank + column, mask=column < rank, other=0.0)
    high = tl.load(k_rope + row * rope + column - rank, mask=(column >= rank) & (column < rank + rope), other=0.0)
    inside = (column < rank + rope) & (slot >= 0) & (slot < limit)
    value = tl.where(column < rank, low, high)
    entry = pages + slot * ((rank + rope) * PARTS) + column
    first, second = two_parts(value)
    tl.store(entry, first, mask=inside)
    if PARTS == 2:
        tl.store(entry + rank + rope, second, mask=inside)


@triton.jit
def write_rounded_entries(
    pages, keys, scales, slots, latent, k_rope, rank, rope, limit, size, key_at, scale_at,
    RANK_2: tl.constexpr, ROPE_2: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One token a program, its entry as `kv_entries` says, of `size` bytes; key_at and scale_at in bytes. pages, keys
    and scales: the same memory as codes, bfloat16 and float32. A slot outside the pages is not written."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if (slot < 0) | (slot >= limit):
        return
    column, turned, word = tl.arange(0, RANK_2), tl.arange(0, ROPE_2), tl.arange(0, 4)
    code, scale = quantized_row(tl.load(latent + row * rank + column, mask=column < rank, other=0.0), FP8)
    key = tl.load(k_rope + row * rope + turned, mask=turned < rope, other=0.0)
    tl.store(pages + slot * size + column, code, mask=column < key_at)
    place = keys + (slot * size + key_at) // 2 + turned
    tl.store(place, nearest_bfloat(key), mask=turned < (scale_at - key_at) // 2)
    place = scales + (slot * size + scale_at) // 4 + word
    tl.store(place, tl.where(word == 0, scale, 0.0), mask=word < (size - scale_at) // 4)


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows [T] int64 of table [N, D] -> [T, D] float32."""
    (length, size), count = table.shape, rows.shape[0]
    out = torch.empty((count, size), dtype=torch.float32, device=table.device)
    if out.numel():
        copy_rows[(count, triton.cdiv(size, _BLOCK))](table, rows, out, size, length, _BLOCK)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, weight, eps, None, None)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Activations]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    return _norm(x, weight, eps, codes, scale), Activations(ActivationFormat.INT8, codes, scale)


def _norm(x: Tensor, weight: Tensor, eps: float, codes: Tensor | None, scale: Tensor | None) -> Tensor:
    tokens, size = x.shape
    out = torch.empty((tokens, size), dtype=torch.float32, device=x.device)
    if tokens:
        width = triton.next_power_of_2(size)
        rms_norm_rows[(tokens,)](
            x, weight, out, out if codes is None else codes, out if scale is None else scale, row_stride(x), size, eps,
            width, codes is not None, num_warps=min(max(width // 512, 1), 16), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tokens, heads, size = x.shape
    if heads > 1:
        x = x.contiguous()
    out = torch.empty((tokens, heads, size), dtype=torch.float32, device=x.device)
    if x.numel():
        pairs = heads * size // 2
        width = triton.next_power_of_2(pairs)
        rope_rows[(tokens,)](
            x, positions, cos, sin, out, x.stride(0), pairs, size // 2, cos.shape[0], width, enable_fp_fusion=False
        )
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
    limit = pages.shape[0] * pages.shape[1]
    if tokens and pages.dtype in ROUNDED:
        layout, fp8 = EntryLayout.of(rank, k_rope.shape[1]), pages.dtype is torch.float8_e4m3fn
        write_rounded_entries[(tokens,)](
            pages.view(torch.uint8) if fp8 else pages, pages.view(torch.bfloat16), pages.view(torch.float32),
            slots, latent, k_rope, rank, k_rope.shape[1], limit, layout.size, layout.key, layout.scale,
            triton.next_power_of_2(layout.key), triton.next_power_of_2(layout.scale - layout.key), fp8,
            enable_fp_fusion=False,
        )  # fmt: skip
    elif tokens:
        width = triton.next_power_of_2(rank + k_rope.shape[1])
        write_entries[(tokens,)](
            pages.view(torch.bfloat16), slots, latent, k_rope, rank, k_rope.shape[1], limit,
            pages.dtype.itemsize // 2, width,
        )  # fmt: skip


__all__ = ["combine", "rms_norm", "rms_norm_quantize", "rope", "silu_mul", "take_rows", "write_kv"]
