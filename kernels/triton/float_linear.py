"""Float linears, split into bfloat16 parts. Weights are the left factor.

A product is summed in chunks of K of one fixed length, each from zero, and the chunks in their order. Programs may then
take a chunk each or all of them, and a row's bits are the same for any number of rows.
"""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import bfloat_parts, two_parts
from .linear_tiles import LinearTuning
from .tiles import row_order

_CHUNK = 512
_COLUMNS = 64


@triton.jit
def float_products(
    x, weight, out, tokens, outputs, heads, inner, chunks,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """x [tokens, heads, inner] float32 times weight [heads, outputs, inner]; program (row tile, tokens, head or chunk).

    SPLIT: program_id(2) is one of `chunks` of a linear with one head, whose sums go to out [chunks, tokens, outputs];
    else it is a head, and all chunks are added to out [tokens, heads, outputs].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    here, valid = row < outputs, token < tokens
    head = 0 if SPLIT else tl.program_id(2)
    column = tl.arange(0, COLUMNS)
    weight += (head * outputs + tl.minimum(row, outputs - 1)).to(tl.int64)[:, None] * inner
    x += (tl.minimum(token, tokens - 1) * heads + head).to(tl.int64)[:, None] * inner
    result = tl.zeros((ROWS, SIZE), tl.float32)
    for number in range(1 if SPLIT else chunks):
        chunk = tl.program_id(2) if SPLIT else number
        total = tl.zeros((ROWS, SIZE), tl.float32)
        for step in range(tl.cdiv(tl.minimum(CHUNK, inner - chunk * CHUNK), COLUMNS)):
            k = chunk * CHUNK + step * COLUMNS + column
            w = tl.load(weight + k[None, :], mask=(k < inner)[None, :], other=0.0)
            rows = tl.load(x + k[None, :], mask=(k < inner)[None, :], other=0.0)
            if weight.dtype.element_ty == tl.bfloat16:
                high, low = two_parts(rows)
                part = tl.dot(w, low.T)
                part = tl.dot(w, high.T, part)
            else:
                high, middle, low = bfloat_parts(rows)
                w_high, w_middle, w_low = bfloat_parts(w)
                part = tl.dot(w_low, high.T)
                part = tl.dot(w_high, low.T, part)
                part = tl.dot(w_middle, middle.T, part)
                part = tl.dot(w_middle, high.T, part)
                part = tl.dot(w_high, middle.T, part)
                part = tl.dot(w_high, high.T, part)
            total += part
        result = total if SPLIT else result + total
    inside = here[:, None] & valid[None, :]
    if SPLIT:
        at = (tl.program_id(2).to(tl.int64) * tokens + token[None, :]) * outputs + row[:, None]
    else:
        at = (token.to(tl.int64)[None, :] * heads + head) * outputs + row[:, None]
    tl.store(out + at, result, mask=inside)


@triton.jit
def add_chunks(parts, residual, out, size, chunks, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    """parts [chunks, size] float32 -> their sums in order, from zero; and residual [size] plus these."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(chunks):
        total += tl.load(parts + chunk.to(tl.int64) * size + at, mask=at < size, other=0.0)
    if RESIDUAL:
        total = tl.load(residual + at, mask=at < size, other=0.0) + total
    tl.store(out + at, total, mask=at < size)


def token_tile(tokens: int) -> int:
    """Rows of x that a program takes."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64 if tokens <= 256 else 128


def linear(x: Tensor, weight: Tensor, tuning: LinearTuning, residual: Tensor | None = None) -> Tensor:
    """x [T, K] float32, weight [N, K] bf16 or float32 -> [T, N] float32; added to `residual` [T, N] float32."""
    parts = float_parts(x, weight, tuning)
    if not parts.numel() or (len(parts) == 1 and residual is None):
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=torch.float32, device=x.device)
    unused = parts if residual is None else residual
    add_chunks[(triton.cdiv(out.numel(), 512),)](
        parts, unused, out, out.numel(), len(parts), residual is not None, 512, enable_fp_fusion=False
    )
    return out


def float_parts(x: Tensor, weight: Tensor, tuning: LinearTuning) -> Tensor:
    """`linear` as the sums of its chunks of K, [chunks, T, N], which are to be added in their order; [1, T, N] where
    there are so many programs that each takes all of K."""
    (tokens, inner), outputs = x.shape, weight.shape[0]
    size, rows, options = _launch(tokens, outputs, tuning, 256)
    grid = (triton.cdiv(outputs, rows), triton.cdiv(max(tokens, 1), size))
    chunks = triton.cdiv(inner, _CHUNK)
    if grid[0] * grid[1] >= tuning.programs or chunks == 1 or tokens == 0:
        return head_linear(x[:, None], weight[None], tuning)[None, :, 0]
    parts = torch.empty((chunks, tokens, outputs), dtype=torch.float32, device=x.device)
    float_products[(*grid, chunks)](
        x, weight, parts, tokens, outputs, 1, inner, chunks, size, rows, _COLUMNS, _CHUNK, True, **options
    )
    return parts


def head_linear(x: Tensor, weight: Tensor, tuning: LinearTuning) -> Tensor:
    """x [T, H, A] float32, weight [H, B, A] bf16 or float32 -> [T, H, B] float32."""
    (tokens, heads, inner), outputs = x.shape, weight.shape[1]
    out = torch.empty((tokens, heads, outputs), dtype=torch.float32, device=x.device)
    if out.numel():
        size, rows, options = _launch(tokens, outputs, tuning, 64)
        grid, chunks = (triton.cdiv(outputs, rows), triton.cdiv(tokens, size), heads), triton.cdiv(inner, _CHUNK)
        float_products[grid](
            x, weight, out, tokens, outputs, heads, inner, chunks, size, rows, _COLUMNS, _CHUNK, False, **options
        )
    return out


def _launch(tokens: int, outputs: int, tuning: LinearTuning, narrow: int) -> tuple[int, int, dict[str, int]]:
    """Tokens and rows of weights of a program, and how it is compiled. Up to `narrow` tokens it takes 64 rows.

    Where it takes 128 and as many tokens, their parts are made for twice the products, by twice the warps; AMD's have
    no registers for it. Few tokens leave room for the loads of most of a chunk at once."""
    size = token_tile(tokens)
    wide = tokens > narrow and outputs % 128 == 0 and (size == 64 or not tuning.amd)
    rows, warps = (128, 8 if size == 128 else 4) if wide else (64, 4)
    stages = 2 if tuning.amd else 6 if size <= 32 else 3
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return size, rows, options | row_order(tuning.amd)


__all__ = ["float_parts", "head_linear", "linear", "token_tile"]
