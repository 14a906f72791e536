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
def _normed(x, weight, column, size, eps):
    """x [size] at columns that are as many as a power of 2, normed; zeros beyond them."""
    inside = column < size
    value = tl.load(x + column, mask=inside, other=0.0)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)  # on its way while the sum is made
    mean = tl.div_rn(tl.sum(value * value, 0), size * 1.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    return value * inverse * factor


@triton.jit
def rms_norm_rows(
    x, weight, out, codes, scale, stride, size, eps,
    SIZE: tl.constexpr, FLOATS: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Rows of x `stride` apart to out [T, size] where FLOATS, and where QUANTIZED in INT8 to codes and scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < size
    value = _normed(x + row * stride, weight, column, size, eps)
    if FLOATS:
        tl.store(out + row * size + column, value, mask=inside)
    if QUANTIZED:
        store_quantized(value, row * size + column, inside, codes, scale, row, False)


@triton.jit
def _inside(number, limit):
    """1 where a number is within 0..limit - 1, else 0."""
    return tl.where((number >= 0) & (number < limit), 1, 0)


@triton.jit
def _turned(x, cos, sin, position, pair, pairs, length):
    """The pairs of one key x, rotated: their even and their odd values, NaN where the tables have no such position and
    zeros beyond the key."""
    known = pair < pairs * _inside(position, length)
    missing = tl.where(pair < pairs, float("nan"), 0.0)
    c = tl.load(cos + position * pairs + pair, mask=known, other=0.0)
    s = tl.load(sin + position * pairs + pair, mask=known, other=0.0)
    even = tl.load(x + pair * 2, mask=known, other=0.0)
    odd = tl.load(x + pair * 2 + 1, mask=known, other=0.0)
    return tl.where(known, even * c - odd * s, missing), tl.where(known, even * s + odd * c, missing)


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
def write_entries(
    pages, slots, rows, norm, positions, cos, sin, stride, rank, pairs, length, limit, eps,
    RANK_2: tl.constexpr, PAIRS_2: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One token a program, its entry as PARTS times its width of bfloat16; a slot outside the pages is not written."""
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    column, pair = tl.arange(0, RANK_2), tl.arange(0, PAIRS_2)
    latent = _normed(rows + row * stride, norm, column, rank, eps)
    even, odd = _turned(rows + row * stride + rank, cos, sin, position, pair, pairs, length)
    width, once = rank + 2 * pairs, _inside(slot, limit)
    entry = pages + slot * (width * PARTS)
    _store_parts(entry + column, latent, column < rank * once, width, PARTS)
    _store_parts(entry + rank + 2 * pair, even, pair < pairs * once, width, PARTS)
    _store_parts(entry + rank + 2 * pair + 1, odd, pair < pairs * once, width, PARTS)


@triton.jit
def _store_parts(place, value, inside, width, PARTS: tl.constexpr):
    first, second = two_parts(value)
    tl.store(place, first, mask=inside)
    if PARTS == 2:
        tl.store(place + width, second, mask=inside)


@triton.jit
def write_rounded_entries(
    pages, keys, scales, slots, rows, norm, positions, cos, sin, stride, rank, pairs, length, limit, eps,
    size, key_at, scale_at, RANK_2: tl.constexpr, PAIRS_2: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One token a program, its entry as `kv_entries` says, of `size` bytes; key_at and scale_at in bytes. pages, keys
    and scales: the same memory as codes, bfloat16 and float32. A slot outside the pages is not written."""
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    once = _inside(slot, limit)
    column, pair, word = tl.arange(0, RANK_2), tl.arange(0, PAIRS_2), tl.arange(0, 4)
    code, scale = quantized_row(_normed(rows + row * stride, norm, column, rank, eps), FP8)
    even, odd = _turned(rows + row * stride + rank, cos, sin, position, pair, pairs, length)
    tl.store(pages + slot * size + column, code, mask=column < key_at * once)
    place, inside = keys + (slot * size + key_at) // 2 + 2 * pair, pair < (scale_at - key_at) // 4 * once
    tl.store(place, nearest_bfloat(even), mask=inside)
    tl.store(place + 1, nearest_bfloat(odd), mask=inside)
    place = scales + (slot * size + scale_at) // 4 + word
    tl.store(place, tl.where(word == 0, scale, 0.0), mask=word < (size - scale_at) // 4 * once)


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows [T] int64 of table [N, D] -> [T, D] float32."""
    (length, size), count = table.shape, rows.shape[0]
    out = torch.empty((count, size), dtype=torch.float32, device=table.device)
    if out.numel():
        copy_rows[(count, triton.cdiv(size, _BLOCK))](table, rows, out, size, length, _BLOCK)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = _floats(x)
    _norm(x, weight, eps, out, None)
    return out


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, floats: bool) -> tuple[Tensor, Activations]:
    out = _floats(x[: len(x) if floats else 0])
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    rows = Activations(ActivationFormat.INT8, codes, torch.empty(len(x), dtype=torch.float32, device=x.device))
    _norm(x, weight, eps, out if floats else None, rows)
    return out, rows


def _floats(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def _norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None, rows: Activations | None) -> None:
    tokens, size = x.shape
    if tokens:
        width, unused = triton.next_power_of_2(size), x
        codes, scale = (unused, unused) if rows is None else (rows.values, rows.scale)
        rms_norm_rows[(tokens,)](
            x, weight, unused if out is None else out, codes, scale, row_stride(x), size, eps,
            width, out is not None, rows is not None, num_warps=_warps(width), enable_fp_fusion=False,
        )  # fmt: skip


def _warps(width: int) -> int:
    """Of a program that has a row in its registers."""
    return min(max(width // 512, 1), 16)


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


def write_kv(
    pages: Tensor, slots: Tensor, rows: Tensor, norm: Tensor, eps: float, positions: Tensor, cos: Tensor, sin: Tensor
) -> None:
    """`Kernels.write_kv` in one launch."""
    tokens, rank, pairs = len(rows), len(norm), cos.shape[1]
    if not tokens:
        return
    values = rows, norm, positions, cos, sin, row_stride(rows), rank, pairs, len(cos), pages.shape[0] * pages.shape[1]
    options = {"num_warps": _warps(triton.next_power_of_2(rank)), "enable_fp_fusion": False}
    if pages.dtype in ROUNDED:
        layout, fp8 = EntryLayout.of(rank, 2 * pairs), pages.dtype is torch.float8_e4m3fn
        write_rounded_entries[(tokens,)](
            pages.view(torch.uint8) if fp8 else pages, pages.view(torch.bfloat16), pages.view(torch.float32),
            slots, *values, eps, layout.size, layout.key, layout.scale,
            triton.next_power_of_2(layout.key), triton.next_power_of_2((layout.scale - layout.key) // 4), fp8,
            **options,
        )  # fmt: skip
    else:
        write_entries[(tokens,)](
            pages.view(torch.bfloat16), slots, *values, eps,
            triton.next_power_of_2(rank), triton.next_power_of_2(pairs), pages.dtype.itemsize // 2, **options,
        )  # fmt: skip


__all__ = ["combine", "rms_norm", "rms_norm_quantize", "silu_mul", "take_rows", "write_kv"]
