"""Queries for absorbed attention: a head's product with its key up-projection, and its rotated rest, in one launch."""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import two_parts
from .float_linear import token_tile
from .tiles import row_order

_COLUMNS = 128
_PROGRAMS = 128
"""Of a row tile; beyond so many a program takes several pieces of the tokens."""


@triton.jit
def absorb_heads(
    q, weight, positions, cos, sin, out, tokens, heads, length,
    INNER: tl.constexpr, LATENT: tl.constexpr, PAIRS: tl.constexpr, PAIRS_2: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """q [tokens, heads, INNER + 2 * PAIRS] float32, weight [heads, LATENT, INNER] -> out [tokens, heads, LATENT + 2 *
    PAIRS]; program (row tile, z, head), of which the last row tile is the rotation; it takes every z-th SIZE tokens."""
    tile, head = tl.program_id(0), tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)
    weight += (head * LATENT + tl.minimum(row, LATENT - 1)).to(tl.int64)[:, None] * INNER
    for first in range(tl.program_id(1) * SIZE, tokens, tl.num_programs(1) * SIZE):
        token = first + tl.arange(0, SIZE)
        valid = token < tokens
        source = q + (token.to(tl.int64) * heads + head) * (INNER + 2 * PAIRS)
        place = out + (token.to(tl.int64) * heads + head) * (LATENT + 2 * PAIRS)
        if tile * ROWS >= LATENT:
            pair = tl.arange(0, PAIRS_2)[None, :]
            position = tl.load(positions + token, mask=valid, other=0)[:, None]
            known = valid[:, None] & (pair < PAIRS) & (position >= 0) & (position < length)
            c = tl.load(cos + position * PAIRS + pair, mask=known, other=float("nan"))
            s = tl.load(sin + position * PAIRS + pair, mask=known, other=float("nan"))
            value = tl.arange(0, 2 * PAIRS_2)[None, :]
            rest = valid[:, None] & (value < 2 * PAIRS)
            unturned = tl.load(source[:, None] + INNER + value, mask=rest, other=0.0)
            even, odd = tl.split(unturned.reshape(SIZE, PAIRS_2, 2))
            turned = tl.join(even * c - odd * s, even * s + odd * c).reshape(SIZE, 2 * PAIRS_2)
            tl.store(place[:, None] + LATENT + value, turned.to(out.dtype.element_ty), mask=rest)
        else:
            total = tl.zeros((ROWS, SIZE), tl.float32)
            for begin in tl.static_range(0, INNER, COLUMNS):
                k = begin + tl.arange(0, COLUMNS)[None, :]
                w = tl.load(weight + k, mask=k < INNER, other=0.0)
                x, x_low = two_parts(tl.load(source[:, None] + k, mask=valid[:, None] & (k < INNER), other=0.0))
                if weight.dtype.element_ty == tl.float32:
                    w, w_low = two_parts(w)
                    total = tl.dot(w_low, x.T, total)
                total = tl.dot(w, x_low.T, total)
                total = tl.dot(w, x.T, total)
            inside = (row < LATENT)[:, None] & valid[None, :]
            tl.store(place[None, :] + row[:, None], total.to(out.dtype.element_ty), mask=inside)


def absorb(
    q: Tensor, weight: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, amd: bool
) -> Tensor:
    """`Kernels.absorb`: q [T, H, A + R] float32, weight [H, L, A] -> [T, H, L + R] of `dtype`. amd: on one of
    AMD's."""
    (tokens, heads, width), (_, latent, inner) = q.shape, weight.shape
    out = torch.empty((tokens, heads, latent + width - inner), dtype=dtype, device=q.device)
    if out.numel():
        size, pairs = min(token_tile(tokens), 64), (width - inner) // 2
        rows, warps = (64, 4) if tokens <= 16 else (256, 8)
        columns = min(_COLUMNS, max(16, triton.next_power_of_2(inner)))
        together = min(triton.cdiv(tokens, size), max(1, _PROGRAMS // heads))
        absorb_heads[(triton.cdiv(latent, rows) + 1, together, heads)](
            q, weight, positions, cos, sin, out, tokens, heads, cos.shape[0],
            inner, latent, pairs, triton.next_power_of_2(pairs), size, rows, columns,
            num_warps=warps, enable_fp_fusion=False, **row_order(amd),
        )  # fmt: skip
    return out


__all__ = ["absorb"]
