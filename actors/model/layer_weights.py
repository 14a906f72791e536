"""The weights one shard holds, in the shapes the stages multiply. Built by `actors.weights`.

A `LinearWeight` is as on disk (bf16, float32, or in 8 bits), or was brought to 8 bits while it was loaded; a `Tensor`
is bf16 or float32 as on disk, unless said otherwise. D, H, E, K, L, R, V as in `kernels.protocol`; I is the MLP's size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...kernels.protocol import LinearWeight
from .expert_blocks import ExpertBlocks


@dataclass(frozen=True)
class AttentionWeights:
    """MLA's projections, `kv_b_proj` split for absorption.

    input_norm: [D]. down: [q_lora_rank + L + R, D], the rows of `q_a_proj` before those of `kv_a_proj_with_mqa`; the
    latter alone in a model without q_lora_rank, where q_norm is None. q_norm: [q_lora_rank]. q_b: [H * (nope + R),
    q_lora_rank or D]. kv_norm: [L]. w_uk: [H, L, nope], the key up-projection transposed. w_uv: [H, v, L]. output:
    [D, H * v].
    """

    input_norm: Tensor
    down: LinearWeight
    q_norm: Tensor | None
    q_b: LinearWeight
    kv_norm: Tensor
    w_uk: Tensor
    w_uv: Tensor
    output: LinearWeight


@dataclass(frozen=True)
class MlpWeights:
    """A gated MLP. gate_up: [2 * I, D], the gate's rows first. down: [D, I]."""

    gate_up: LinearWeight
    down: LinearWeight


@dataclass(frozen=True)
class MoeWeights:
    """gate: [E, D]. gate_bias: [E] float32, `e_score_correction_bias`. experts: this shard's part of the layer's."""

    gate: Tensor
    gate_bias: Tensor
    shared: MlpWeights
    experts: ExpertBlocks


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. post_norm: [D], the norm before the MLP."""

    attention: AttentionWeights
    post_norm: Tensor
    mlp: MlpWeights | MoeWeights


@dataclass(frozen=True)
class ShardWeights:
    """embed: [V, D]. head: [V, D]. norm: [D]. experts: the routed experts that `layers` were loaded with, by slot,
    of every layer alike."""

    embed: Tensor
    head: LinearWeight
    norm: Tensor
    layers: tuple[LayerWeights, ...]
    experts: tuple[int, ...]
