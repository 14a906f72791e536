"""What one token multiplies in a layer: weights by matrix products, and cached latents by attention.

A multiplication and an addition are two operations, so a weight is two.
"""

from __future__ import annotations

from math import prod

from ..actors.model.config import ModelConfig
from ..actors.model.tensors import attention_tensors


def attention_weights(model: ModelConfig) -> int:
    """Of the projections of a layer's attention."""
    return sum(prod(spec.shapes[0]) for spec in attention_tensors(model, 0) if len(spec.shapes[0]) == 2)


def head_weights(model: ModelConfig) -> int:
    """Of those projections, what tensor-parallel attention divides: queries from their latents, keys and values from
    theirs."""
    per_head = (model.q_lora_rank or model.hidden_size) * model.qk_head_dim
    per_head += model.kv_lora_rank * (model.qk_nope_head_dim + model.v_head_dim)
    return model.num_attention_heads * per_head


def output_weights(model: ModelConfig) -> int:
    """Of those projections, attention's output."""
    return model.num_attention_heads * model.v_head_dim * model.hidden_size


def attention_values(model: ModelConfig) -> int:
    """Of a cached token, over all heads: each multiplies the latent and the shared key, and then the latent again."""
    return model.num_attention_heads * (model.kv_width + model.kv_lora_rank)


def mlp_weights(model: ModelConfig, inner: int) -> int:
    """Of gate, up and down with `inner` columns between them."""
    return 3 * inner * model.hidden_size


def gate_weights(model: ModelConfig) -> int:
    """Of the scores of all routed experts."""
    return model.n_routed_experts * model.hidden_size


def shared_weights(model: ModelConfig) -> int:
    """Of a MoE layer's shared experts."""
    return mlp_weights(model, model.n_shared_experts * model.moe_intermediate_size)


def expert_weights(model: ModelConfig) -> int:
    """Of one routed expert."""
    return mlp_weights(model, model.moe_intermediate_size)
