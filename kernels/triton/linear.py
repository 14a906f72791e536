"""Linears: INT8 and INT4 by exact integer sums, floats split into bfloat16 parts. Weights are the left factor.

A float product is summed in chunks of K of one fixed length, each from zero, and the chunks in their order. Programs
may then take a chunk each or all of them, and a row's bits are the same for any number of rows.
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

from ..protocol import ActivationFormat, Activations, Int4Weight, Int8Weight
from .arithmetic import bfloat_parts, ordered_silu, two_parts
from .quantize import store_quantized
from .unpacking import unpacked

_UNPACKED_FROM = 64
"""Above so many rows INT4 is unpacked once, in memory, and not by each program again."""
_CHUNK = 512
_FLOAT_COLUMNS = 64


@dataclass(frozen=True)
class LinearTuning:
    """What fits a GPU; no bit depends on it. programs: below so many K is cut, about two a multiprocessor. int8, int4,
    floats: stages of the pipeline by the kind of weight, as many as a program's shared memory holds."""

    programs: int
    int8: int
    int4: int
    floats: int


def linear_tuning(gpu: str) -> LinearTuning:
    """gpu: as in the table of tiles. A program of AMD's has 64 KiB, where an H200's has 227. 512 leaves the widest
    product of Kimi-K2.5 whole, for `hidden_rows` would spill on AMD's with two parts of it."""
    return LinearTuning(512, 2, 2, 2) if gpu.startswith("gfx") else LinearTuning(264, 4, 3, 3)


@triton.jit
def integer_products(
    x, values, multipliers, x_scale, scale, out, parts, tokens, outputs, inner, steps,
    INT4: tl.constexpr, IN_TURN: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x int8 [tokens, inner] times the transpose of `Int8Weight.values`, or of INT4 nibbles, as int32 words, with their
    multipliers; program (row tile, tokens, part of K).

    Each part takes `steps` tiles of K. SPLIT: its sums go to parts [program_id(2), tokens, outputs] int32, else,
    scaled, to out [tokens, outputs] float32. A group of 32 INT4 values has its first 16 in low nibbles: the two halves
    of a tile multiply every other 16 activations.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    here, valid = row < outputs, token < tokens
    # Rows beyond the last read that one again: an address costs less than a mask, and what it gives is not stored.
    # Not so the tokens: a few would all read one place, three times slower where they are 1 of 16.
    own = tl.minimum(row, outputs - 1).to(tl.int64)[:, None]
    COLUMNS: tl.constexpr = 256 if INT4 else 128
    first = tl.program_id(2) * steps * COLUMNS
    column = tl.arange(0, 128)
    k = (column // 16) * 32 + column % 16 if INT4 else column
    source = x + token.to(tl.int64)[:, None] * inner + first + k[None, :]
    WORDS: tl.constexpr = 32 if INT4 else 128
    VALUES: tl.constexpr = COLUMNS // WORDS
    word = tl.arange(0, WORDS)
    weight = values + own * (inner // VALUES) + first // VALUES + word[None, :]
    group = tl.arange(0, 8)
    factor = multipliers + own * (inner // 32) + first // 32 + group[None, :]
    total = tl.zeros((ROWS, SIZE), tl.int32)
    for step in tl.range(0, steps, num_stages=STAGES):
        left = inner - first - step * COLUMNS
        if EVEN:
            w, rows = tl.load(weight), tl.load(source, mask=valid[:, None], other=0)
        else:
            w = tl.load(weight, mask=(word * VALUES < left)[None, :], other=0)
            rows = tl.load(source, mask=valid[:, None] & (k < left)[None, :], other=0)
        if INT4:
            if EVEN:
                high = tl.load(source + 16, mask=valid[:, None], other=0)
                multiplier = tl.load(factor).to(tl.int32)
            else:
                high = tl.load(source + 16, mask=valid[:, None] & (k + 16 < left)[None, :], other=0)
                multiplier = tl.load(factor, mask=(group * 32 < left)[None, :], other=0).to(tl.int32)
            total = tl.dot(unpacked(w & 0x0F0F0F0F, multiplier, ROWS, 8), rows.T, total, out_dtype=tl.int32)
            upper = unpacked((w >> 4) & 0x0F0F0F0F, multiplier, ROWS, 8)
            total = tl.dot(upper, high.T, total, out_dtype=tl.int32)
            factor += 8
        else:
            total = tl.dot(w, rows.T, total, out_dtype=tl.int32)
        weight += WORDS
        source += COLUMNS
    inside = here[:, None] & valid[None, :]
    at = token.to(tl.int64)[None, :] * outputs + row[:, None]
    if SPLIT:
        part = tl.program_id(2).to(tl.int64) * tokens * outputs
        tl.store(parts + part + at, total, mask=inside)
    else:
        x_size = tl.load(x_scale + token, mask=valid, other=0.0)[None, :]
        w_size = tl.load(scale + row, mask=here, other=0.0)[:, None]
        sums = total.to(tl.float32)
        tl.store(out + at, sums * x_size * w_size if IN_TURN else sums * (x_size * w_size), mask=inside)


@triton.jit
def integer_epilogue(
    parts, x_scale, scale, out, tokens, outputs,
    PARTS: tl.constexpr, IN_TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts of K and scales; program (token, columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < outputs
    total = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (part * tokens + token) * outputs + column, mask=inside, other=0)
    x_size, w_size = tl.load(x_scale + token), tl.load(scale + column, mask=inside, other=0.0)
    sums = total.to(tl.float32)
    value = sums * x_size * w_size if IN_TURN else sums * (x_size * w_size)
    tl.store(out + token * outputs + column, value, mask=inside)


@triton.jit
def hidden_rows(parts, x_scale, scale, values, out_scale, tokens, width, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """parts [PARTS, tokens, 2 * width] of gate's and up's sums -> silu(gate) * up in INT8; a token a program."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < width
    gate, up = tl.zeros((SIZE,), tl.int32), tl.zeros((SIZE,), tl.int32)
    for part in tl.static_range(PARTS):
        at = parts + (part * tokens + token) * 2 * width + column
        gate += tl.load(at, mask=inside, other=0)
        up += tl.load(at + width, mask=inside, other=0)
    x_size = tl.load(x_scale + token)
    gates = gate.to(tl.float32) * x_size * tl.load(scale + column, mask=inside, other=0.0)
    ups = up.to(tl.float32) * x_size * tl.load(scale + width + column, mask=inside, other=0.0)
    hidden = tl.where(inside, ordered_silu(gates) * ups, 0.0)
    store_quantized(hidden, token * width + column, inside, values, out_scale, token, False)


@triton.jit
def unpack_weight(nibbles, multipliers, values, groups, GROUPS: tl.constexpr):
    """`groups` groups of an `Int4Weight`, 16 bytes and a multiplier each, as the 32 INT8 values that they stand for."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = (group < groups)[:, None]
    byte = tl.arange(0, 16)[None, :]
    packed = tl.load(nibbles + group[:, None] * 16 + byte, mask=inside, other=0).to(tl.int32)
    factor = tl.load(multipliers + group, mask=group < groups, other=0).to(tl.int32)[:, None]
    at = values + group[:, None] * 32 + byte
    tl.store(at, (((packed & 15) - 8) * factor).to(tl.int8), mask=inside)
    tl.store(at + 16, (((packed >> 4) - 8) * factor).to(tl.int8), mask=inside)


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
def add_chunks(parts, out, size, chunks, BLOCK: tl.constexpr):
    """parts [chunks, size] float32 -> their sums in order, from zero."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(chunks):
        total += tl.load(parts + chunk.to(tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total, mask=at < size)


def token_tile(tokens: int) -> int:
    """Rows of x that a program takes."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64 if tokens <= 256 else 128


def integer_linear(
    x: Activations, weight: Int8Weight | Int4Weight, tuning: LinearTuning, in_turn: bool = False
) -> Tensor:
    """INT8 rows [T, K] times the transpose of the weight -> [T, N] float32, the reference's bits. in_turn: sums are
    multiplied by the row's scale and then by the weight's, as experts do, not by the product of both."""
    tokens, outputs = len(x.values), len(weight.scale)
    out = torch.empty((tokens, outputs), dtype=torch.float32, device=x.values.device)
    if not out.numel():
        return out
    sums = _products(x, weight, out, tuning, in_turn)
    if sums is not None:
        integer_epilogue[(tokens, triton.cdiv(outputs, 512))](
            sums, x.scale, weight.scale, out, tokens, outputs, len(sums), in_turn, 512, enable_fp_fusion=False
        )
    return out


def gated_hidden(x: Activations, gate_up: Int8Weight | Int4Weight, tuning: LinearTuning) -> Activations:
    """INT8 rows [T, K] -> silu(gate) * up in INT8 [T, I], as experts round it; gate_up [2 * I, K]."""
    tokens, width = len(x.values), len(gate_up.scale) // 2
    values = torch.empty((tokens, width), dtype=torch.int8, device=x.values.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.values.device)
    if tokens:
        sums = _products(x, gate_up, None, tuning, True)
        assert sums is not None
        size = triton.next_power_of_2(width)
        hidden_rows[(tokens,)](
            sums, x.scale, gate_up.scale, values, scale, tokens, width, len(sums), size,
            num_warps=min(max(size // 512, 1), 16), enable_fp_fusion=False,
        )  # fmt: skip
    return Activations(ActivationFormat.INT8, values, scale)


def _products(
    x: Activations, weight: Int8Weight | Int4Weight, out: Tensor | None, tuning: LinearTuning, in_turn: bool
) -> Tensor | None:
    """The sums of each part of K [parts, T, N] int32; or none, but scaled ones in `out`, if K is one part."""
    (tokens, inner), outputs, device = x.values.shape, len(weight.scale), x.values.device
    if isinstance(weight, Int4Weight) and tokens > _UNPACKED_FROM:
        weight = _unpacked(weight)
    int4, unused = isinstance(weight, Int4Weight), x.scale
    values, multipliers = (weight.nibbles.view(torch.int32), weight.multipliers) if int4 else (weight.values, unused)
    size, rows, columns = token_tile(tokens), 64 if tokens <= 32 else 128, 256 if int4 else 128
    grid, depth = (triton.cdiv(outputs, rows), triton.cdiv(tokens, size)), triton.cdiv(inner, columns)
    steps = triton.cdiv(depth, max(1, min(tuning.programs // (grid[0] * grid[1]), depth // 4)))
    parts = triton.cdiv(depth, steps)
    split = parts > 1 or out is None
    sums = torch.empty((parts, tokens, outputs), dtype=torch.int32, device=device) if split else None
    even, stages = inner == parts * steps * columns, tuning.int4 if int4 else tuning.int8
    integer_products[(*grid, parts)](
        x.values, values, multipliers, x.scale, weight.scale, unused if out is None else out,
        unused if sums is None else sums, tokens, outputs, inner, steps,
        int4, in_turn, size, rows, even, split, stages, num_warps=4, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return sums


def _unpacked(weight: Int4Weight) -> Int8Weight:
    outputs, half = weight.nibbles.shape
    values = torch.empty((outputs, 2 * half), dtype=torch.int8, device=weight.nibbles.device)
    groups = weight.multipliers.numel()
    unpack_weight[(triton.cdiv(groups, 128),)](weight.nibbles, weight.multipliers, values, groups, 128)
    return Int8Weight(values, weight.scale)


def linear(x: Tensor, weight: Tensor, tuning: LinearTuning) -> Tensor:
    """x [T, K] float32, weight [N, K] bf16 or float32 -> [T, N] float32."""
    parts = float_parts(x, weight, tuning)
    if len(parts) == 1:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=torch.float32, device=x.device)
    add_chunks[(triton.cdiv(out.numel(), 512),)](parts, out, out.numel(), len(parts), 512)
    return out


def float_parts(x: Tensor, weight: Tensor, tuning: LinearTuning) -> Tensor:
    """`linear` as the sums of its chunks of K, [chunks, T, N], which are to be added in their order; [1, T, N] where
    there are so many programs that each takes all of K."""
    (tokens, inner), outputs = x.shape, weight.shape[0]
    size, rows = token_tile(tokens), 64
    grid = (triton.cdiv(outputs, rows), triton.cdiv(max(tokens, 1), size))
    chunks = triton.cdiv(inner, _CHUNK)
    if grid[0] * grid[1] >= tuning.programs or chunks == 1 or tokens == 0:
        return head_linear(x[:, None], weight[None], tuning)[None, :, 0]
    parts = torch.empty((chunks, tokens, outputs), dtype=torch.float32, device=x.device)
    float_products[(*grid, chunks)](
        x, weight, parts, tokens, outputs, 1, inner, chunks, size, rows, _FLOAT_COLUMNS, _CHUNK, True,
        num_warps=4, num_stages=tuning.floats, enable_fp_fusion=True,
    )  # fmt: skip
    return parts


def head_linear(x: Tensor, weight: Tensor, tuning: LinearTuning) -> Tensor:
    """x [T, H, A] float32, weight [H, B, A] bf16 or float32 -> [T, H, B] float32."""
    (tokens, heads, inner), outputs = x.shape, weight.shape[1]
    out = torch.empty((tokens, heads, outputs), dtype=torch.float32, device=x.device)
    if out.numel():
        size, rows = token_tile(tokens), 128 if 64 < tokens <= 256 and outputs % 128 == 0 else 64
        grid = (triton.cdiv(outputs, rows), triton.cdiv(tokens, size), heads)
        float_products[grid](
            x, weight, out, tokens, outputs, heads, inner, triton.cdiv(inner, _CHUNK),
            size, rows, _FLOAT_COLUMNS, _CHUNK, False,
            num_warps=4, num_stages=tuning.floats, enable_fp_fusion=True,
        )  # fmt: skip
    return out


__all__ = [
    "LinearTuning",
    "float_parts",
    "gated_hidden",
    "head_linear",
    "integer_linear",
    "linear",
    "linear_tuning",
    "token_tile",
]
