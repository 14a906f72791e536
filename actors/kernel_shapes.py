"""What a model asks of kernels, for backends that choose a source by it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.protocol import Int4Weight, Int8Weight, LinearWeight
from ..kernels.source import KernelShapes, LinearShape
from .checkpoint import Checkpoint
from .linear_kinds import LINEAR_KINDS, linear_kind
from .model.config import ModelConfig
from .model.expert_matrix import MATRIX_KINDS
from .model.tensor_slice import TensorSlice
from .precision import memory_format
from .quantization_config import MIXED

LinearKinds = dict[str, tuple[type[LinearWeight], ...]]
"""What each kind of weight of `LINEAR_KINDS` is in memory; several where a checkpoint has some in INT8."""


def kernel_shapes(
    model: ModelConfig,
    formats: Collection[str],
    linears: LinearKinds,
    local_experts: int,
    kv_dtype: torch.dtype,
    page_size: int,
    tensor: Sequence[TensorSlice] = (),
) -> KernelShapes:
    """formats: in memory, of the routed experts. local_experts: the most that one shard holds. tensor: the shards'
    slices where attention is tensor-parallel."""
    slices = tensor or TensorSlice.all_of(model, 1)
    kinds = {MATRIX_KINDS[format] for format in formats}
    shapes = dict.fromkeys(
        LinearShape(kind, rows, columns)
        for part in slices
        for word, rows, columns in _linears(model, part)
        for kind in linears[word]
    )
    return KernelShapes(
        hidden_size=model.hidden_size,
        heads=max(len(part.heads) for part in slices),
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        moe_intermediate_size=model.moe_intermediate_size,
        experts=model.n_routed_experts,
        local_experts=local_experts,
        gate=model.gate,
        expert_kinds=tuple(sorted(kinds, key=lambda kind: kind.__name__)),
        linears=tuple(shapes),
        kv_dtype=kv_dtype,
        page_size=page_size,
    )


def rounded_linears(int8_weights: Collection[str], int4_weights: Collection[str]) -> LinearKinds:
    """Of a checkpoint in floats, loaded with these kinds rounded."""
    rounded: dict[str, type[LinearWeight]] = dict.fromkeys(int8_weights, Int8Weight)
    rounded |= dict.fromkeys(int4_weights, Int4Weight)
    return {word: (rounded.get(word, Tensor),) for word in LINEAR_KINDS}


def loaded_linears(checkpoint: Checkpoint, int8_weights: Collection[str], int4_weights: Collection[str]) -> LinearKinds:
    """Of a checkpoint, some of whose linears may be in INT8 on the disk and stay so."""
    on_disk = {linear_kind(module) for module in checkpoint.formats.int8_linears}
    rounded = rounded_linears(int8_weights, int4_weights)
    return {
        word: (*kinds, Int8Weight) if word in on_disk and Int8Weight not in kinds else kinds
        for word, kinds in rounded.items()
    }


def loaded_formats(checkpoint: Checkpoint, precision: str) -> set[str]:
    """Of a checkpoint's routed experts in memory. Raises PrecisionError."""
    memory = memory_format(checkpoint.formats.experts, precision)
    return set(checkpoint.formats.by_expert.values()) if memory == MIXED else {memory}


def _linears(model: ModelConfig, part: TensorSlice) -> Iterator[tuple[str, int, int]]:
    """Kind, rows and columns of what `linear` or `mlp` multiply, as `layer_weights` holds them."""
    hidden, heads, queries = model.hidden_size, model.num_attention_heads, model.q_lora_rank
    yield "attention", (queries or 0) + model.kv_width, hidden
    yield "attention", len(part.heads) * model.qk_head_dim, queries or hidden
    yield "attention", hidden, heads * model.v_head_dim
    inner = {"shared": model.n_shared_experts * model.moe_intermediate_size}
    if model.first_k_dense_replace:
        inner["dense"] = model.intermediate_size
    for word, size in inner.items():
        yield word, 2 * size, hidden
        yield word, hidden, size
    yield "head", len(part.vocabulary), hidden
