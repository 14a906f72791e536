"""Rows of floats to INT8 and FP8, as `Kernels.quantize` defines them to the bit."""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..protocol import ActivationFormat, Activations
from .arithmetic import row_scale, scaled_row, to_e4m3, to_int8


@triton.jit
def quantized_row(x, FP8: tl.constexpr):
    """One row x, already loaded, zeros where it has nothing -> its codes and its scale."""
    # Magnitudes are ordered as their bits are, which puts NaN above infinity.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    largest, finite = bits.to(tl.float32, bitcast=True), bits < 0x7F800000
    LIMIT: tl.constexpr = 448.0 if FP8 else 127.0
    size = row_scale(largest, finite, LIMIT)
    scaled = scaled_row(x, size, LIMIT)
    return to_e4m3(scaled) if FP8 else to_int8(scaled), size


@triton.jit
def store_quantized(x, at, inside, values, scale, row, FP8: tl.constexpr):
    """`quantized_row` to values + at and scale + row."""
    code, size = quantized_row(x, FP8)
    tl.store(values + at, code, mask=inside)
    tl.store(scale + row, size)


@triton.jit
def quantize_rows(x, values, scale, size, SIZE: tl.constexpr, FP8: tl.constexpr):
    """One row of `size` values a program. SIZE: the power of 2 that holds them."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < size
    loaded = tl.load(x + row * size + column, mask=inside, other=0.0)
    store_quantized(loaded, row * size + column, inside, values, scale, row, FP8)


def quantize(x: Tensor, format: ActivationFormat) -> Activations:
    """x [T, D] float32 -> INT8 or FP8 rows; a row with a NaN or an infinity becomes zeros with scale NaN."""
    tokens, size = x.shape
    fp8 = format is ActivationFormat.FP8
    values = torch.empty_like(x, dtype=torch.uint8 if fp8 else torch.int8)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        width = triton.next_power_of_2(max(size, 1))
        warps = min(max(width // 512, 1), 16)
        quantize_rows[(tokens,)](x, values, scale, size, width, fp8, num_warps=warps, enable_fp_fusion=False)
    return Activations(format, values.view(torch.float8_e4m3fn) if fp8 else values, scale)


__all__ = ["quantize", "quantize_rows", "quantized_row", "store_quantized"]
