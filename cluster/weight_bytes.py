"""The bytes that weights take in a shard's memory, without a weight.

What loading would allocate is allocated on torch's "meta" device, which has sizes and no memory: the numbers are those
of a loaded shard, not of a formula beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, is_dataclass
from math import prod

import torch
from torch import Tensor

from ..actors.linear_kinds import LINEAR_KINDS, check_linear_kinds
from ..actors.model.config import ModelConfig
from ..actors.model.expert_matrix import MATRIX_KINDS, allocate_matrix
from ..actors.model.tensor_slice import TensorSlice, narrowed
from ..actors.model.tensors import TensorSpec, attention_tensors, expert_shapes, mlp_tensors, outer_tensors
from ..actors.model.weight_memory import WeightMemory
from ..kernels.protocol import ExpertWeights
from ..kernels.triton.layouts import tile_experts

_META = WeightMemory(torch.device("meta"))


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a dense layer's MLP, of one layer's attention with its norms, of a MoE layer's gate and of its shared
    experts, of one routed expert, and of embedding and head."""

    embedding: int
    head: int
    attention: int
    dense: int
    gate: int
    shared: int
    expert: int


def weight_bytes(
    config: ModelConfig,
    format: str,
    int8_weights: Collection[str],
    int4_weights: Collection[str],
    tiled: bool,
    tensor: TensorSlice | None = None,
) -> WeightBytes:
    """format: of the routed experts in memory; int8_weights, int4_weights: as in `EngineConfig`. tiled: experts as the
    GPU's kernels read them, else as those of the CPU. tensor: a shard's slice, None without tensor-parallel attention.
    Raises ValueError for kinds that there are not."""
    check_linear_kinds(int8_weights, int4_weights)
    rounded = dict.fromkeys((LINEAR_KINDS[word] for word in int8_weights), "w8a8")
    rounded |= dict.fromkeys((LINEAR_KINDS[word] for word in int4_weights), "w4a8")

    sliced = {} if tensor is None else tensor.rows(config)

    def of(specs: Iterable[TensorSpec], *kinds: str) -> int:
        chosen = (narrowed(spec, sliced) for spec in specs if not kinds or spec.kind in kinds)
        return sum(_bytes(spec, rounded.get(spec.kind)) for spec in chosen)

    outer, moe = tuple(outer_tensors(config)), config.moe_layers.start
    return WeightBytes(
        embedding=of(outer, "embedding", "norms"),
        head=of(outer, "lm_head"),
        attention=of(attention_tensors(config, 0)),
        dense=of(mlp_tensors(config, 0)) if config.first_k_dense_replace else 0,
        gate=of(mlp_tensors(config, moe), "gate", "gate bias") if config.moe_layers else 0,
        shared=of(mlp_tensors(config, moe), "shared experts") if config.moe_layers else 0,
        expert=_expert_bytes(config, format, tiled),
    )


def shard_weight_bytes(config: ModelConfig, weights: WeightBytes, experts: int) -> int:
    """All that a shard holds with so many routed experts of every layer."""
    dense, moe = config.first_k_dense_replace, len(config.moe_layers)
    attention = config.num_hidden_layers * weights.attention
    per_moe = weights.gate + weights.shared + experts * weights.expert
    return weights.embedding + weights.head + attention + dense * weights.dense + moe * per_moe


def matrix_bytes(format: str, rows: int, columns: int) -> int:
    """Of one matrix in a memory format, laid out in rows. Raises ValueError for a format that there is not."""
    if format not in MATRIX_KINDS:
        raise ValueError(f"format {format!r}: its bytes are not known")
    return _size(allocate_matrix(format, 1, rows, columns, _META))


def _bytes(spec: TensorSpec, rounded: str | None) -> int:
    """Of a tensor that is bfloat16 on disk. The gate's bias is kept in float32; kv_b_proj is never rounded."""
    shape = spec.shapes[0]
    if rounded is None or len(shape) != 2 or spec.module.endswith("kv_b_proj"):
        return prod(shape) * (4 if spec.kind == "gate bias" else 2)
    return matrix_bytes(rounded, *shape)


def _expert_bytes(config: ModelConfig, format: str, tiled: bool) -> int:
    shapes = expert_shapes(config)
    inner, hidden = shapes["gate_proj"]
    gate_up = allocate_matrix(format, 1, 2 * inner, hidden, _META)
    weights = ExpertWeights(gate_up, allocate_matrix(format, 1, *shapes["down_proj"], _META))
    return _size(tile_experts(weights) if tiled else weights)


def _size(value: object) -> int:
    """Of all tensors in a dataclass."""
    if isinstance(value, Tensor):
        return value.nbytes
    if not is_dataclass(value) or isinstance(value, type):
        return 0
    return sum(_size(getattr(value, field.name)) for field in fields(value))
