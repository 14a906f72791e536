"""A shard's check of its kernels against the reference, for the shapes and formats that its model needs."""

from __future__ import annotations

from dataclasses import replace

from ..kernels.protocol import ExpertMatrix, Kernels, matrix_kind
from ..kernels.selfcheck import CheckShapes, self_check
from .model.config import ModelConfig
from .model.layer_weights import MoeWeights, ShardWeights
from .model.prompt_attention import PromptAttention


def check_kernels(
    kernels: Kernels,
    model: ModelConfig,
    weights: ShardWeights,
    page_size: int,
    prompt_attention: PromptAttention = "absorbed",
) -> tuple[str, ...]:
    """A line for each comparison, such as "cpu.linear: error 0 of 1e-05". Raises KernelMismatch with the numbers."""
    shapes = replace(check_shapes(model, page_size), heads=len(weights.layers[0].attention.w_uk))
    results = self_check(kernels, shapes, matrix_kinds(weights), prompt_attention == "expanded")
    return tuple(
        f"{kernels.name}.{result.operation}: error {result.max_error:.2g} of {result.allowed:.2g}" for result in results
    )


def check_shapes(model: ModelConfig, page_size: int) -> CheckShapes:
    """The dimensions that the model's kernels run with."""
    return CheckShapes(
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        kv_lora_rank=model.kv_lora_rank,
        qk_rope_head_dim=model.qk_rope_head_dim,
        qk_nope_head_dim=model.qk_nope_head_dim,
        v_head_dim=model.v_head_dim,
        experts=model.n_routed_experts,
        intermediate=model.moe_intermediate_size,
        page_size=page_size,
        gate=model.gate,
    )


def matrix_kinds(weights: ShardWeights) -> tuple[type[ExpertMatrix], ...]:
    """The kinds of expert matrices that a shard holds, in the order of their names."""
    blocks = [
        block for layer in weights.layers if isinstance(layer.mlp, MoeWeights) for block in layer.mlp.experts.blocks
    ]
    kinds = {matrix_kind(matrix) for block in blocks for matrix in (block.gate_up, block.down)}
    return tuple(sorted(kinds, key=lambda kind: kind.__name__))
