"""AITER on the CPU: what its documentation and published sources say that its functions do, in torch.

An emulation, written from documentation: nothing of AITER was run. Each function takes its arguments through a recorded
signature of a release, refuses shapes and dtypes that the real one does not take, and computes with float32 what the
real one computes, with its roundings to bfloat16, out of the layouts that the real one reads. It is there to execute
what the adapter lays out, lists and passes. Held by hand against the references in torch that the sources of
0.1.7.post2.dev18 have beside its kernels: `shuffle_weight` and both stages of the INT8 MoE equal, the gate's choices
equal and weights within 2e-7, the scales of rows equal.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from typing import Any

import torch
from aiter_signatures import Signatures
from torch import Tensor

from flyray.kernels.aiter.key_lists import KeyLists
from flyray.kernels.aiter.package import Aiter
from flyray.kernels.protocol import PagedBatch

BF16 = torch.bfloat16


class QuantType(enum.Enum):
    No = 0
    per_Token = 2
    per_1x32 = 3


class ActivationType(enum.Enum):
    Silu = 0


CONSTANTS = {
    "silu": ActivationType.Silu,
    "no_quantization": QuantType.No,
    "per_token": QuantType.per_Token,
    "per_1x32": QuantType.per_1x32,
    "int4": torch.uint8,  # AITER's own fallback where torch has no INT4 that computes
}


def emulated(signatures: Signatures, called: set[str] | None = None) -> Aiter:
    """The library of a release with these signatures. called: takes up the names of functions that were called."""
    taken = set() if called is None else called
    functions = {name: _checked(name, signature, taken) for name, signature in signatures.items()}
    return Aiter(lambda call: functions[call.name], CONSTANTS.__getitem__)


def listed_keys(batch: PagedBatch, rows: slice, page_size: int, copies: int, splits: int) -> KeyLists:
    """What `key_lists` makes on a device, in torch: the oracle of that kernel."""
    queries = torch.arange(rows.start, rows.stop, dtype=torch.int32)
    owner = torch.searchsorted(batch.query_start[1:], queries, right=True).clamp_(max=len(batch.page_table) - 1)
    slots = (batch.page_table[owner].clamp_(min=0)[..., None] * page_size + torch.arange(page_size)).flatten(1)
    seen = (batch.positions[rows] + 1).clamp(0, slots.shape[1]).tolist()
    lists = [slots[row, :length] for row, length in enumerate(seen) for _ in range(copies)]
    many = torch.arange(len(lists) + 1, dtype=torch.int32)
    starts = torch.tensor([0, *(len(each) for each in lists)]).cumsum(0).to(torch.int32)
    return KeyLists(many, starts, torch.cat(lists).to(torch.int32), torch.ones_like(many[1:]), many * splits)


def _checked(name: str, signature: inspect.Signature, called: set[str]) -> Callable[..., Any]:
    run = _FUNCTIONS[name]
    understood = inspect.signature(run).parameters

    def function(*positional: Any, **keywords: Any) -> Any:
        bound = signature.bind(*positional, **keywords)
        called.add(name)
        unknown = bound.arguments.keys() - understood.keys()
        assert not unknown, f"{name}: the emulation does not know {unknown}"
        return run(**bound.arguments)

    return function


def mla_decode_fwd(
    q: Tensor, kv_buffer: Tensor, o: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor,
    kv_last_page_lens: Tensor, max_seqlen_q: int, sm_scale: float, num_kv_splits: int, num_kv_splits_indptr: Tensor,
) -> None:  # fmt: skip
    sequences = len(qo_indptr) - 1
    _takes(q, BF16, (sequences, q.shape[1], 576))
    assert q.shape[1] in (16, 128), "other numbers of heads have a kernel in some releases only"
    _takes(kv_buffer, BF16, (len(kv_buffer), 1, 1, 576))
    _takes(o, BF16, (sequences, q.shape[1], 512))
    for tensor, size in ((qo_indptr, 1), (kv_indptr, 1), (kv_last_page_lens, 0), (num_kv_splits_indptr, 1)):
        _takes(tensor, torch.int32, (sequences + size,))
    _takes(kv_indices, torch.int32, (len(kv_indices),))
    assert max_seqlen_q == 1
    assert qo_indptr.tolist() == list(range(sequences + 1))
    assert kv_last_page_lens.tolist() == [1] * sequences
    assert num_kv_splits_indptr.tolist() == list(range(0, (sequences + 1) * num_kv_splits, num_kv_splits))
    starts = kv_indptr.tolist()
    assert starts[0] == 0
    assert starts[-1] <= len(kv_indices)
    for sequence in range(sequences):
        # In float64, so that a head's bits do not hang on where in a product of this machine's it stands.
        keys = kv_buffer[kv_indices[starts[sequence] : starts[sequence + 1]].long(), 0, 0].double()
        shares = torch.softmax(q[sequence].double() @ keys.T * sm_scale, dim=1)
        o[sequence] = (shares.to(BF16).double() @ keys[:, :512]).to(BF16)


def biased_grouped_topk(
    gating_output: Tensor, correction_bias: Tensor, topk_weights: Tensor, topk_ids: Tensor, num_expert_group: int,
    topk_group: int, need_renorm: bool, routed_scaling_factor: float,
) -> None:  # fmt: skip
    tokens, experts = gating_output.shape
    _takes(gating_output, torch.float32, (tokens, experts))
    _takes(correction_bias, torch.float32, (experts,))
    _takes(topk_weights, torch.float32, topk_ids.shape)
    _takes(topk_ids, torch.int32, (tokens, topk_ids.shape[1]))
    assert topk_ids.shape[1] <= 64
    biased = torch.sigmoid(gating_output) + correction_bias
    grouped = biased.view(tokens, num_expert_group, -1)
    ranks = grouped.topk(2, dim=2).values.sum(2).topk(topk_group, dim=1).indices
    is_open = torch.zeros(tokens, num_expert_group, dtype=torch.bool).scatter_(1, ranks, True)
    best = grouped.masked_fill(~is_open[..., None], -torch.inf).view(tokens, experts).topk(topk_ids.shape[1], dim=1)
    weights = best.values - correction_bias[best.indices]
    total = weights.sum(1, keepdim=True) if need_renorm else torch.ones(tokens, 1)
    topk_ids.copy_(best.indices)
    topk_weights.copy_(weights * (routed_scaling_factor / total))


def rms_norm(input: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    _takes(input, BF16, (len(input), len(weight)))
    _takes(weight, BF16, weight.shape)
    x = input.float()
    return (x * torch.rsqrt(x.square().mean(1, keepdim=True) + epsilon) * weight.float()).to(BF16)


def per_token_quant_hip(x: Tensor, quant_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _takes(x, BF16, x.shape)
    assert quant_dtype == torch.int8
    return _rounded(x.float(), 127.0, torch.int8)


def silu_and_mul(out: Tensor, input: Tensor) -> None:
    size = out.shape[1]
    _takes(out, BF16, (len(input), size))
    _takes(input, BF16, (len(input), 2 * size))
    out.copy_(torch.nn.functional.silu(input[:, :size].float()) * input[:, size:].float())


def gemm_a8w8(XQ: Tensor, WQ: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype, splitK: int) -> Tensor:
    _takes(XQ, torch.int8, (len(XQ), WQ.shape[1]))
    _takes(WQ, torch.int8, WQ.shape)
    _takes(x_scale, torch.float32, (len(XQ), 1))
    _takes(w_scale, torch.float32, (1, len(WQ)))
    assert dtype == BF16
    assert splitK == 0
    return ((XQ.double() @ WQ.double().T).float() * x_scale * w_scale).to(dtype)


def fused_moe(
    hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weight: Tensor, topk_ids: Tensor, expert_mask: Tensor,
    activation: ActivationType, quant_type: QuantType, w1_scale: Tensor | None, w2_scale: Tensor | None,
    a1_scale: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    tokens, hidden = hidden_states.shape
    experts, inner = len(w1), w1.shape[1] // 2
    _takes(topk_ids, torch.int32, (tokens, topk_ids.shape[1]))
    _takes(topk_weight, torch.float32, topk_ids.shape)
    _takes(expert_mask, torch.int32, (expert_mask.numel(),))
    assert activation is ActivationType.Silu
    assert dtype == BF16
    assert hidden % 128 == 0
    assert inner % 128 == 0
    local = torch.where(expert_mask > 0, expert_mask.cumsum(0) - 1, -1)[topk_ids.long()]
    assert all(getattr(each, "is_shuffled", False) or each.dtype == torch.uint8 for each in (w1, w2))
    first, second = _weights(w1, w1_scale, quant_type, hidden), _weights(w2, w2_scale, quant_type, inner)
    assert first.shape == (experts, 2 * inner, hidden)
    assert second.shape == (experts, hidden, inner)
    x = _activations(hidden_states, a1_scale, w1, quant_type)
    out = torch.zeros(tokens, hidden)
    for token, slot in (local >= 0).nonzero().tolist():
        expert = int(local[token, slot])
        both = x[token].double() @ first[expert].T
        row = (torch.nn.functional.silu(both[:inner]) * both[inner:]).to(BF16).float()[None]
        if quant_type is QuantType.per_Token:
            values, scale = _rounded(row, 127.0 if w2.dtype == torch.int8 else 240.0, w2.dtype)
            row = values.float() * scale
        out[token] += (row[0].double() @ second[expert].T).float() * topk_weight[token, slot]
    return out.to(dtype)


def shuffle_weight(x: Tensor, layout: tuple[int, int]) -> Tensor:
    """Blocks of 16 rows by 32 values (of one byte each), within them 2 halves of 16 values, rows inside."""
    assert layout == (16, 16)
    rows, columns = x.shape[-2:]
    inside = 16 // x.element_size()
    codes = x.view(torch.uint8) if x.element_size() == 1 else x
    blocks = codes.view(-1, rows // 16, 16, columns // 32, 32 // inside, inside).permute(0, 1, 3, 4, 2, 5)
    return blocks.contiguous().view(x.shape).view(x.dtype)


def pack_int8_to_packed_int4(x_shuf_i8: Tensor) -> Tensor:
    """Eight values v0..v7 -> 4 bytes, byte j = v_j | v_(j + 4) << 4."""
    _takes(x_shuf_i8, torch.int8, x_shuf_i8.shape)
    nibbles = (x_shuf_i8.reshape(-1, 8) & 15).view(torch.uint8)
    return (nibbles[:, :4] | (nibbles[:, 4:] << 4)).view(torch.int8).flatten()


def shuffle_scale_for_int4(scale: Tensor, group_size: int) -> Tensor:
    """[E, G, N] -> [E, G / 2, N, 2]: two neighbouring groups of a row together."""
    assert group_size == 32
    experts, groups, rows = scale.shape
    _takes(scale, BF16, scale.shape)
    return scale.view(experts, groups // 2, 2, rows).permute(0, 1, 3, 2).contiguous()


def _weights(matrix: Tensor, scale: Tensor | None, quant_type: QuantType, columns: int) -> Tensor:
    """Weights [E, N, K] float64 out of the layouts that `fused_moe` reads."""
    experts, rows, _ = matrix.shape
    if quant_type is QuantType.per_1x32:
        assert matrix.dtype == torch.uint8
        assert scale is not None
        _takes(scale, BF16, (experts * rows * columns // 32,))
        bytes_ = matrix.reshape(-1, 4)
        nibbles = torch.cat([bytes_ & 15, bytes_ >> 4], dim=1).view(torch.int8)
        values = _unshuffled(((nibbles ^ 8) - 8).view(experts, rows, columns)).double()
        groups = scale.view(experts, columns // 64, rows, 2).permute(0, 2, 1, 3).reshape(experts, rows, columns // 32)
        return values * groups.double().repeat_interleave(32, 2)
    values = _unshuffled(matrix).double()
    if quant_type is QuantType.No:
        assert matrix.dtype == BF16
        assert scale is None
        return values
    assert matrix.dtype in (torch.int8, torch.float8_e4m3fnuz)
    assert scale is not None
    _takes(scale, torch.float32, (experts, rows, 1))
    return values * scale.double()


def _activations(x: Tensor, scale: Tensor | None, weights: Tensor, quant_type: QuantType) -> Tensor:
    if quant_type is QuantType.per_Token:
        assert scale is not None
        _takes(x, weights.dtype, x.shape)
        _takes(scale, torch.float32, (len(x), 1))
        return x.float() * scale
    assert scale is None
    _takes(x, BF16, x.shape)
    return x


def _unshuffled(x: Tensor) -> Tensor:
    experts, rows, columns = x.shape
    inside = 16 // x.element_size()
    codes = x.view(torch.uint8) if x.element_size() == 1 else x
    blocks = codes.view(experts, rows // 16, columns // 32, 32 // inside, 16, inside).permute(0, 1, 4, 2, 3, 5)
    return blocks.contiguous().view(x.shape).view(x.dtype)


def _rounded(x: Tensor, limit: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows times the reciprocal of their scale; a row of zeros keeps scale 0."""
    scale = x.abs().amax(1, keepdim=True) * (1.0 / limit)
    scaled = torch.where(scale > 0, x * (1.0 / scale), 0.0).clamp(-limit, limit)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def _takes(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tensor.shape == shape, (tensor.shape, shape)
    assert tensor.is_contiguous()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    run.__name__: run
    for run in (
        mla_decode_fwd, biased_grouped_topk, rms_norm, per_token_quant_hip, silu_and_mul, gemm_a8w8, fused_moe,
        shuffle_weight, pack_int8_to_packed_int4, shuffle_scale_for_int4,
    )
}  # fmt: skip
