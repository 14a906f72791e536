"""Every backend refuses what it cannot run, naming the operation and the argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_cases import expert_weights, int4_weight, int8_weight, normal, paged, pairs
from torch import Tensor

from flyray.kernels.protocol import (
    ActivationFormat,
    Activations,
    Bf16Matrix,
    ExpertWeights,
    GateConfig,
    Int4Matrix,
    Int4Weight,
    Int8Matrix,
    Kernels,
    PagedBatch,
)

X, W = normal(1, 3, 8), normal(2, 5, 8)
W8 = int8_weight(5, 8)
X4, W4 = normal(1, 3, 32), int4_weight(5, 32)
HEADS = normal(3, 3, 2, 8)
TABLE = normal(4, 10, 4)
ONE_PAIR, UP = normal(9, 10, 1), normal(1, 2, 5, 6)
POSITIONS = torch.tensor([0, 9, 3])
PAGES = normal(5, 4, 2, 8)
CONFIG = GateConfig(2, 1, 1, True, 1.0)
BIAS = torch.zeros(5)
BATCH, _ = paged([2, 1], [3, 4], 2, 0, 1)
ONE_PAGE = BATCH.page_table[:, :1].contiguous()
Q = normal(6, 3, 2, 8)
EXPERTS = expert_weights(Int8Matrix, 2, 32, 32)
TOKEN, EXPERT = pairs(3, 2, 4)
QUANTIZED = Activations(ActivationFormat.INT8, torch.ones(3, 32, dtype=torch.int8), torch.ones(3))
FLOATS, MLP = Activations(ActivationFormat.FLOAT, X, None), (int8_weight(64, 32), int8_weight(32, 32))


def attend(k: Kernels, batch: PagedBatch, rank: int = 6) -> Tensor:
    return k.mla_attention(Q, PAGES.to(k.kv_dtype), batch, 1.0, rank)


def write(
    k: Kernels,
    slots: Tensor = POSITIONS - POSITIONS,
    rows: Tensor = X,
    norm: Tensor = X[0, :6],
    positions: Tensor = POSITIONS,
    sin: Tensor = ONE_PAIR,
) -> None:
    k.write_kv(PAGES.to(k.kv_dtype), slots, rows, norm, 1e-6, positions, ONE_PAIR, sin)


def run(
    k: Kernels,
    weights: ExpertWeights = EXPERTS,
    x: Activations = QUANTIZED,
    token: Tensor = TOKEN,
    expert: Tensor = EXPERT,
) -> Tensor:
    return k.experts(x, token, expert, weights)


def with_multipliers(dtype: torch.dtype) -> Int4Weight:
    return replace(W4, multipliers=W4.multipliers.to(dtype))


def with_nibbles(columns: int) -> ExpertWeights:
    good = expert_weights(Int4Matrix, 2, 32, 32)
    assert isinstance(good.gate_up, Int4Matrix)
    return replace(good, gate_up=replace(good.gate_up, nibbles=good.gate_up.nibbles[..., :columns].contiguous()))


BAD_CALLS: dict[str, tuple[str, Callable[[Kernels], object]]] = {
    "norm dtype": ("rms_norm: x is float64", lambda k: k.rms_norm(X.double(), X[0], 1e-6)),
    "norm weight": ("rms_norm: weight is float32 \\[5\\]", lambda k: k.rms_norm(X, X[0, :5].contiguous(), 1e-6)),
    "norm rank": ("rms_norm: x is .*2 dimensions", lambda k: k.rms_norm(X[0], X[0], 1e-6)),
    "linear width": ("linear: weight is float32 \\[5, 7\\]", lambda k: k.linear(X, W[:, :7].contiguous())),
    "linear dtype": ("linear: weight is float16", lambda k: k.linear(X, W.half())),
    "linear stride": ("linear: x .*not contiguous", lambda k: k.linear(normal(1, 8, 3).T, W)),
    "int8 width": ("linear: weight.values is int8 \\[5, 9\\]", lambda k: k.linear(X, int8_weight(5, 9))),
    "int8 dtype": ("linear: weight.values is uint8", lambda k: k.linear(X, replace(W8, values=W8.values.byte()))),
    "int8 scale": ("linear: weight.scale is float32 \\[4\\]", lambda k: k.linear(X, replace(W8, scale=W8.scale[:4]))),
    "int8 scale dtype": ("weight.scale is float64", lambda k: k.linear(X, replace(W8, scale=W8.scale.double()))),
    "int8 x": ("linear: x is bfloat16", lambda k: k.linear(X.bfloat16(), W8)),
    "int8 overflow": ("K = 132105; .* overflow", lambda k: k.linear(normal(1, 1, 132105), int8_weight(1, 132105))),
    "int4 width": ("linear: weight.nibbles is uint8 \\[5, 32\\]", lambda k: k.linear(X4, int4_weight(5, 64))),
    "int4 group": ("linear: x has K = 8, not a multiple of 32", lambda k: k.linear(X, W4)),
    "int4 multipliers": ("weight.multipliers is int8", lambda k: k.linear(X4, with_multipliers(torch.int8))),
    "heads": ("head_linear: weight is", lambda k: k.head_linear(HEADS, normal(1, 3, 4, 8))),
    "int8 rows": ("linear: x.scale is float32 \\[2\\]", lambda k: k.linear(replace(QUANTIZED, scale=BIAS[:2]), W4)),
    "rows for floats": ("linear: x is int8 Activations, expected a Tensor", lambda k: k.linear(QUANTIZED, W)),
    "floats as rows": ("linear: x.format is float, expected int8", lambda k: k.linear(FLOATS, W8)),
    "residual": ("linear: residual is float32 \\[5, 8\\]", lambda k: k.linear(X, W, W)),
    "int8 residual": ("linear: residual is float32 \\[5, 8\\]", lambda k: k.linear(X, W8, W)),
    "mlp residual": ("mlp: residual is float32 \\[5, 8\\]", lambda k: k.mlp(QUANTIZED, *MLP, W)),
    "kv odd": ("write_kv: 3 columns are rotated, which are not pairs", lambda k: write(k, norm=X[0, :5])),
    "kv norm": ("write_kv: rows is .* than the 8 of norm", lambda k: write(k, norm=X[0])),
    "kv positions": ("write_kv: positions is int32", lambda k: write(k, positions=POSITIONS.int())),
    "kv table": ("write_kv: sin is", lambda k: write(k, sin=ONE_PAIR[:5])),
    "kv range": ("positions\\[1\\] is 10, expected 0 to 9", lambda k: write(k, positions=POSITIONS + 1)),
    "kv slots": ("slots\\[0\\] is -1, expected 0 to 7", lambda k: write(k, POSITIONS - 1)),
    "kv width": ("write_kv: pages is", lambda k: write(k, rows=normal(1, 3, 10))),
    "absorb range": ("positions\\[1\\] is 10", lambda k: k.absorb(HEADS, UP, POSITIONS + 1, ONE_PAIR, ONE_PAIR)),
    "rank": ("mla_attention: kv_lora_rank is 9", lambda k: attend(k, BATCH, 9)),
    "queries": ("query_start", lambda k: attend(k, replace(BATCH, query_start=torch.tensor([0, 1, 2]).int()))),
    "backwards": ("sequence", lambda k: attend(k, replace(BATCH, query_start=torch.tensor([0, 4, 3]).int()))),
    "context": ("context_len 1", lambda k: attend(k, replace(BATCH, context_len=torch.tensor([1, 4]).int()))),
    "positions": ("positions\\[0\\] is 5", lambda k: attend(k, replace(BATCH, positions=torch.tensor([5, 2, 3])))),
    "no page": ("page_table\\[0\\]", lambda k: attend(k, replace(BATCH, page_table=BATCH.page_table * 0 - 1))),
    "page range": ("page_table\\[0\\]", lambda k: attend(k, replace(BATCH, page_table=BATCH.page_table + 4))),
    "few pages": ("page_table\\[0\\]", lambda k: attend(k, replace(BATCH, page_table=ONE_PAGE))),
    "table dtype": ("page_table is int64", lambda k: attend(k, replace(BATCH, page_table=BATCH.page_table.long()))),
    "gate groups": ("n_group = 2", lambda k: k.gate(X, W, BIAS, replace(CONFIG, n_group=2))),
    "gate top_k": ("top_k is 6", lambda k: k.gate(X, W, BIAS, replace(CONFIG, top_k=6))),
    "gate topk_group": ("topk_group is 2", lambda k: k.gate(X, W, BIAS, replace(CONFIG, topk_group=2))),
    "gate bias": ("gate: bias is bfloat16", lambda k: k.gate(X, W, BIAS.bfloat16(), CONFIG)),
    "silu odd": ("silu_mul: gate_up has 7", lambda k: k.silu_mul(X[:, :7].contiguous())),
    "quantize": ("quantize: x is bfloat16", lambda k: k.quantize(X.bfloat16(), ActivationFormat.INT8)),
    "combine": ("combine: weights is", lambda k: k.combine(normal(1, 3, 2, 8), normal(1, 3, 3), X, X)),
    "combine shared": ("combine: shared is", lambda k: k.combine(normal(1, 3, 2, 8), normal(1, 3, 2), W, X)),
    "combine residual": ("combine: residual is", lambda k: k.combine(normal(1, 3, 2, 8), normal(1, 3, 2), X, W)),
    "rows range": ("rows\\[1\\] is 9, expected 0 to 4", lambda k: k.take_rows(W, POSITIONS)),
    "rows dtype": ("take_rows: rows is int32", lambda k: k.take_rows(W, POSITIONS.int())),
    "rows table": ("take_rows: table is float16", lambda k: k.take_rows(W.half(), POSITIONS)),
    "columns": ("rms_norm: x .* nor columns", lambda k: k.rms_norm(normal(1, 8, 3).T, X[0], 1e-6)),
    "rows repeated": ("rms_norm: x .* nor columns", lambda k: k.rms_norm(X[:1].expand(3, 8), X[0], 1e-6)),
    "heads apart": ("head_linear: x .* nor columns", lambda k: k.head_linear(normal(1, 3, 4, 6)[:, ::3], UP)),
    "absorb": ("absorb: q is .* than the 8", lambda k: k.absorb(HEADS, normal(1, 2, 4, 8), POSITIONS, TABLE, TABLE)),
    "mlp": ("both must be of one kind", lambda k: k.mlp(QUANTIZED, int8_weight(64, 32), int4_weight(32, 32))),
    "mlp sizes": ("weights.down", lambda k: k.mlp(QUANTIZED, int8_weight(64, 32), int8_weight(32, 31))),
    "format": ("x.format is int8", lambda k: run(k, expert_weights(Bf16Matrix, 2, 32, 32))),
    "mixed": ("one kind", lambda k: run(k, replace(EXPERTS, down=expert_weights(Bf16Matrix, 2, 32, 32).down))),
    "sizes": ("weights.down", lambda k: run(k, replace(EXPERTS, down=expert_weights(Int8Matrix, 2, 32, 64).down))),
    "hidden": ("x.values is", lambda k: run(k, expert_weights(Int8Matrix, 2, 64, 32))),
    "group": ("K = 24, not a multiple of 32", lambda k: run(k, with_nibbles(12))),
    "no scale": ("x.scale is None", lambda k: run(k, x=replace(QUANTIZED, scale=None))),
    "token range": ("pair_token\\[\\d\\] is \\d, expected 0 to 2", lambda k: run(k, token=TOKEN + 3)),
    "token dtype": ("pair_token is int64", lambda k: run(k, token=TOKEN.long())),
    "expert range": ("pair_expert\\[0\\] is \\d, expected 0 to 1", lambda k: run(k, expert=EXPERT + 2)),
}  # fmt: skip

# What only the contents of tensors tell.
OF_CONTENTS = (
    "absorb range", "kv range", "kv slots", "queries", "backwards", "context", "positions", "no page", "page range",
    "few pages", "rows range", "token range", "expert range",
)  # fmt: skip

OF_STRIDES = ("rows repeated", "heads apart")


@pytest.mark.parametrize("name", BAD_CALLS)
def test_refuses_with_the_argument_named(kernels: Kernels, name: str) -> None:
    message, call = BAD_CALLS[name]
    if kernels.name == "triton" and name in OF_CONTENTS + OF_STRIDES:
        pytest.skip("numbers on a GPU are not read back, and what is moved there loses its strides")
    with pytest.raises(ValueError, match=message):
        call(kernels)


def test_no_rows_are_fine(kernels: Kernels) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert kernels.linear(X[:0], W).shape == (0, 5)
    assert kernels.linear(X[:0], W8).shape == (0, 5)
    assert kernels.linear(X4[:0], W4).shape == (0, 5)
    assert kernels.rms_norm(X[:0], X[0], 1e-6).shape == (0, 8)
    assert kernels.silu_mul(X[:0]).shape == (0, 4)
    assert kernels.quantize(X[:0], ActivationFormat.INT8).values.shape == (0, 8)
    assert kernels.gate(X[:0], W, BIAS, CONFIG)[0].shape == (0, 2)
    write(kernels, none, X[:0], positions=none)
    empty, _ = paged([], [], 2, 0, 0)
    assert kernels.mla_attention(Q[:0], PAGES.to(kernels.kv_dtype), empty, 1.0, 6).shape == (0, 2, 6)
    assert kernels.take_rows(W, none).shape == (0, 8)
    assert kernels.absorb(HEADS[:0], UP, none, ONE_PAIR, ONE_PAIR).shape == (0, 2, 7)
    pair = TOKEN[:0]
    assert kernels.experts(QUANTIZED, pair, pair, EXPERTS).shape == (0, 32)
