"""Routed experts by AITER's fused MoE, one pair a row.

Its own combination of a token's experts sums in no fixed order, so every (token, expert) pair is handed over as a token
that visits one expert with weight 1: what comes back are the unweighted rows that `Kernels.experts` promises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import join_nibbles
from ..protocol import (
    ActivationFormat,
    Activations,
    Bf16Matrix,
    ExpertMatrix,
    ExpertWeights,
    Fp8Matrix,
    Int4Matrix,
    Int8Matrix,
)
from .fnuz import fnuz_scale, fnuz_values
from .package import Aiter

LAYOUT = (16, 16)
UNIT = 128
"""Hidden and intermediate sizes are multiples of it: of the assembly's slices, and of the tiles of the others."""
_QUANTIZATION = {Int4Matrix: "per_1x32", Int8Matrix: "per_token", Fp8Matrix: "per_token", Bf16Matrix: "no_quantization"}


@dataclass(frozen=True)
class AiterMatrix:
    """One expert matrix [E, N, K] in AITER's shuffled layout.

    kind: what it was made of. values: [E, N, K] int8, float8_e4m3fnuz or bfloat16, or [E, N, K/2] uint8, eight values
    v0..v7 as four bytes v_j | v_(j+4) << 4. scale: [E, N, 1] float32; for INT4 bfloat16 scales of groups
    of 32 [E, K/64, N, 2]; None for bfloat16.
    """

    kind: type[ExpertMatrix]
    values: Tensor
    scale: Tensor | None
    experts: int
    rows: int
    inner: int


@dataclass(frozen=True)
class AiterExperts:
    """`ExpertWeights` as AITER multiplies them. here: [E + 1] int32, 1 for every expert and 0 for the one beyond them,
    which pairs that are to be left out visit."""

    gate_up: AiterMatrix
    down: AiterMatrix
    here: Tensor


def lay_out(library: Aiter, weights: ExpertWeights) -> AiterExperts:
    """One layer's experts in AITER's layout, on the same device."""
    gate_up, down = _matrix(library, weights.gate_up), _matrix(library, weights.down)
    here = torch.ones(gate_up.experts + 1, dtype=torch.int32, device=gate_up.values.device)
    here[-1].zero_()
    return AiterExperts(gate_up, down, here)


def run(library: Aiter, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: AiterExperts) -> Tensor:
    """`Kernels.experts` of P > 0 pairs; rows of pairs with a negative expert are undefined."""
    first, second = weights.gate_up, weights.down
    rows, scale = _rows(x, pair_token, first.kind)
    ids = torch.where(pair_expert < 0, first.experts, pair_expert)[:, None]
    out = library.call(
        "fused_moe",
        hidden_states=rows,
        w1=_passed_values(library, first),
        w2=_passed_values(library, second),
        topk_weight=torch.ones(ids.shape, dtype=torch.float32, device=ids.device),
        topk_ids=ids,
        expert_mask=weights.here,
        activation=library.constant("silu"),
        quant_type=library.constant(_QUANTIZATION[first.kind]),
        w1_scale=_passed_scale(first),
        w2_scale=_passed_scale(second),
        a1_scale=scale,
        dtype=torch.bfloat16,
    )
    return out.to(torch.float32)


def _passed_values(library: Aiter, matrix: AiterMatrix) -> Tensor:
    """INT4 in AITER's own type, whose tensors torch does not compute with."""
    return matrix.values.view(library.constant("int4")) if matrix.kind is Int4Matrix else matrix.values


def _passed_scale(matrix: AiterMatrix) -> Tensor | None:
    """INT4 groups are passed without their shape."""
    return matrix.scale.view(-1) if matrix.kind is Int4Matrix and matrix.scale is not None else matrix.scale


def _rows(x: Activations, pair_token: Tensor, kind: type[ExpertMatrix]) -> tuple[Tensor, Tensor | None]:
    """Each pair's activations and their scales [P, 1], as the kernel for that kind of weights takes them."""
    token = pair_token.to(torch.int64)
    codes = x.values.view(torch.uint8) if x.format is ActivationFormat.FP8 else x.values
    values = codes[token].view(x.values.dtype)
    if x.scale is None:
        return values.to(torch.bfloat16), None
    scale = x.scale[token, None]
    if kind is Int4Matrix:
        return (values * scale).to(torch.bfloat16), None
    return (fnuz_values(values), fnuz_scale(scale)) if kind is Fp8Matrix else (values, scale)


def _matrix(library: Aiter, matrix: ExpertMatrix) -> AiterMatrix:
    """An expert at a time, so that beside the result stands no second copy of a layer."""
    kind, codes = type(matrix), matrix.nibbles if isinstance(matrix, Int4Matrix) else matrix.values
    experts, rows, inner = codes.shape
    values = torch.empty_like(codes, dtype=torch.float8_e4m3fnuz if kind is Fp8Matrix else codes.dtype)
    # A mark of AITER's own shuffle, without which some releases shuffle once more.
    values.is_shuffled = True  # pyright: ignore[reportAttributeAccessIssue]
    for each, place in zip(codes, values, strict=True):
        place.copy_(_expert(library, kind, each).view(place.shape))
    if isinstance(matrix, Int4Matrix):
        return AiterMatrix(kind, values, _int4_scale(library, matrix), experts, rows, 2 * inner)
    if isinstance(matrix, Bf16Matrix):
        return AiterMatrix(kind, values, None, experts, rows, inner)
    scale = fnuz_scale(matrix.scale) if kind is Fp8Matrix else matrix.scale
    return AiterMatrix(kind, values, scale[..., None].contiguous(), experts, rows, inner)


def _expert(library: Aiter, kind: type[ExpertMatrix], codes: Tensor) -> Tensor:
    """One expert's codes [N, K], or nibbles [N, K/2], in AITER's order."""
    if kind is Int4Matrix:
        shuffled = library.call("shuffle_weight", x=join_nibbles(codes), layout=LAYOUT)
        return library.call("pack_int8_to_packed_int4", x_shuf_i8=shuffled).view(torch.uint8)
    return library.call("shuffle_weight", x=fnuz_values(codes) if kind is Fp8Matrix else codes, layout=LAYOUT)


def _int4_scale(library: Aiter, matrix: Int4Matrix) -> Tensor:
    """Multiplier times scale, rounded to bfloat16, for every group."""
    groups = (matrix.multipliers * matrix.scale[..., None]).to(torch.bfloat16).transpose(1, 2).contiguous()
    return library.call("shuffle_scale_for_int4", scale=groups, group_size=32)


__all__ = ["UNIT", "AiterExperts", "AiterMatrix", "lay_out", "run"]
