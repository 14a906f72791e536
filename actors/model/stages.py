"""The model as the stages that a stage program orders: each one a few kernel calls, for one layer.

Shapes use the letters of `kernels.protocol`. Attention is MLA with absorbed projections throughout: the key
up-projection moves to the query and the value up-projection behind the softmax, so that prefill and decode do the
same sums over the cached latents and a text does not depend on how its prompt was cut. Where the user chose expanded
attention for prompts (`prompt_attention`), long chunks of one sequence do other sums, and it may depend on that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from ...kernels.protocol import (
    Activations,
    AheadKernels,
    ExpandingKernels,
    IntegerWeight,
    Kernels,
    LinearWeight,
    PagedBatch,
)
from .config import LATENT_NORM_EPS, ModelConfig
from .expert_blocks import ExpertBlocks
from .kv_pages import KvPages
from .layer_weights import AttentionWeights, MlpWeights, MoeWeights, ShardWeights
from .prompt_attention import PromptAttention, least_expanded_rows, long_chunks, others
from .rope import rope_tables, softmax_scale

T = TypeVar("T")


@dataclass(frozen=True)
class Routing:
    """What the gate decides for T tokens.

    normed: [T, D] float, the layer's normed input, and rows, the same in INT8, for the shared experts. ids: [T, K]
    int32, weights: [T, K] float32. activations: the same rows in the format the routed experts multiply, ready to
    travel.
    """

    normed: Tensor
    rows: Activations
    ids: Tensor
    weights: Tensor
    activations: Activations


class ModelStages:
    """One shard's weights and cache with the functions that its interpreter calls.

    `layer` is the layer's number. `hidden` is the residual stream, [T, D] float; stages return it anew. All arithmetic
    is the kernels', so that stages can be captured. changes: how often experts were replaced.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ShardWeights,
        kernels: Kernels,
        kv: KvPages,
        prompt_attention: PromptAttention = "absorbed",
    ) -> None:
        """prompt_attention: "expanded" for chunks of at least `least_expanded_rows`; all other rows are absorbed.
        Raises ValueError for kernels that cannot expand."""
        self.config = config
        self.weights = weights
        self.kv = kv
        self.changes = 0
        self._kernels = kernels
        self._ahead = kernels if isinstance(kernels, AheadKernels) else None
        self._expanding: ExpandingKernels | None = None
        if prompt_attention == "expanded":
            if not isinstance(kernels, ExpandingKernels):
                raise ValueError(f"prompt_attention: the backend {kernels.name!r} has no expanded attention")
            self._expanding, self._least_expanded = kernels, least_expanded_rows(config)
        self._gate = config.gate
        self._scale = softmax_scale(config)
        length = min(config.max_position_embeddings, kv.num_pages * kv.page_size)
        cos, sin = rope_tables(config, length)
        self._cos, self._sin = cos.to(kernels.device), sin.to(kernels.device)

    def experts_of(self, layer: int) -> ExpertBlocks:
        """The layer's routed experts that this shard holds now."""
        return self._moe(layer).experts

    def replace_experts(self, layer: int, experts: ExpertBlocks) -> None:
        """From the next stage on the layer runs these experts. Other layers and their weights stay where they are."""
        layers = list(self.weights.layers)
        layers[layer] = replace(layers[layer], mlp=replace(self._moe(layer), experts=experts))
        self.weights = replace(self.weights, layers=tuple(layers))
        self.changes += 1

    @property
    def max_pages(self) -> int:
        """Pages that the longest sequence takes."""
        return -(-len(self._cos) // self.kv.page_size)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [T] int64 -> hidden."""
        return self._kernels.take_rows(self.weights.embed, tokens)

    def attention(self, layer: int, hidden: Tensor, batch: PagedBatch) -> Tensor:
        """Norm, attention over the pages (after writing this step's entries), output projection, residual."""
        return self.output(layer, hidden, self.own_heads(layer, hidden, batch))

    def own_heads(self, layer: int, hidden: Tensor, batch: PagedBatch) -> Tensor:
        """Attention up to its output projection, of the heads whose weights are here: [T, heads * v_head_dim]."""
        kernels, config, weights = self._kernels, self.config, self.weights.layers[layer].attention
        pages, angles = self.kv.values[layer], (batch.positions, self._cos, self._sin)
        low = self._normed_linear(hidden, weights.input_norm, config.rms_norm_eps, weights.down)
        rank = config.q_lora_rank or 0
        entries, eps = low[:, rank:], LATENT_NORM_EPS
        self._branch(len(low), lambda: kernels.write_kv(pages, batch.slots, entries, weights.kv_norm, eps, *angles))
        if weights.q_norm is None:
            q = self._normed_linear(hidden, weights.input_norm, config.rms_norm_eps, weights.q_b)
        else:
            q = self._normed_linear(low[:, :rank], weights.q_norm, LATENT_NORM_EPS, weights.q_b)
        q = q.unflatten(1, (-1, config.qk_head_dim))
        if self._expanding is not None and (chunks := long_chunks(batch, self._least_expanded)):
            self._join()
            heads = q.new_empty(len(q), weights.w_uv.shape[0] * weights.w_uv.shape[1])
            given = weights.w_uk, weights.w_uv, self._cos, self._sin, self._scale
            for chunk in chunks:
                self._expanding.expanded_attention(q, pages, batch, chunk, *given, heads)
            for other in others(batch, chunks):
                heads[other.rows] = self._absorbed(weights, q[other.rows], pages, other.batch)
            return heads
        return self._absorbed(weights, q, pages, batch)

    def _absorbed(self, weights: AttentionWeights, q: Tensor, pages: Tensor, batch: PagedBatch) -> Tensor:
        """q [T, heads, A + R] -> [T, heads * v_head_dim]."""
        kernels, rank = self._kernels, self.config.kv_lora_rank
        q = kernels.absorb(q, weights.w_uk, batch.positions, self._cos, self._sin)
        self._join()
        latent = kernels.mla_attention(q, pages, batch, self._scale, rank)
        return kernels.head_linear(latent, weights.w_uv).flatten(1)

    def output(self, layer: int, hidden: Tensor, heads: Tensor) -> Tensor:
        """Output projection of all heads [T, H * v_head_dim], residual."""
        return self._kernels.linear(heads, self.weights.layers[layer].attention.output, hidden)

    def dense(self, layer: int, hidden: Tensor) -> Tensor:
        """Norm, the layer's dense MLP, residual."""
        weights = self.weights.layers[layer]
        if not isinstance(weights.mlp, MlpWeights):
            raise ValueError(f"layer {layer} has routed experts, not a dense MLP")
        floats = not isinstance(weights.mlp.gate_up, IntegerWeight)
        eps = self.config.rms_norm_eps
        normed, rows = self._kernels.rms_norm_quantize(hidden, weights.post_norm, eps, floats)
        return self._mlp(weights.mlp, normed, rows, hidden)

    def gate(self, layer: int, hidden: Tensor) -> Routing:
        """Norm, choice of experts, and the activations in the experts' format."""
        weights = self._moe(layer)
        post_norm, eps = self.weights.layers[layer].post_norm, self.config.rms_norm_eps
        normed, rows = self._kernels.rms_norm_quantize(hidden, post_norm, eps)
        ids, values = self._kernels.gate(normed, weights.gate, weights.gate_bias, self._gate)
        if weights.experts.activations is rows.format:
            return Routing(normed, rows, ids, values, rows)
        return Routing(normed, rows, ids, values, self._kernels.quantize(normed, weights.experts.activations))

    def shared(self, layer: int, routing: Routing) -> Tensor:
        """The shared experts of the normed input [T, D] -> [T, D], which `combine` alone may read: captured, they run
        beside the routed experts."""
        weights = self._moe(layer).shared
        return self._branch(len(routing.ids), lambda: self._mlp(weights, routing.normed, routing.rows))

    def experts(self, layer: int, activations: Activations, pair_token: Tensor, pair_expert: Tensor) -> Tensor:
        """This shard's routed experts: pair_token [P] int32 rows of `activations`, pair_expert [P] int32 local expert
        numbers -> [P, D] float32, not yet weighted."""
        return self._moe(layer).experts.run(self._kernels, activations, pair_token, pair_expert)

    def combine(self, layer: int, hidden: Tensor, slots: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
        """Residual plus routed experts (slots [T, K, D] float32 by weights [T, K]) plus shared [T, D]."""
        top_k = self.config.num_experts_per_tok
        if layer not in self.config.moe_layers or slots.shape[:2] != (hidden.shape[0], top_k):
            raise ValueError(f"layer {layer} cannot combine slots {tuple(slots.shape)} of {hidden.shape[0]} tokens")
        self._join()
        return self._kernels.combine(slots, weights, shared, hidden)

    def take(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Rows [S] int64 of hidden -> [S, D]."""
        return self._kernels.take_rows(hidden, rows)

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and vocabulary projection of the rows that need logits: [S, D] -> [S, V], of the part of the
        vocabulary whose weights are here."""
        normed = self._kernels.rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)
        return self._kernels.linear(normed, self.weights.head)

    def _normed_linear(self, x: Tensor, norm: Tensor, eps: float, weight: LinearWeight) -> Tensor:
        """x [T, K] float, columns of a wider matrix too, norm [K] -> [T, N]."""
        if isinstance(weight, IntegerWeight):
            return self._kernels.linear(self._kernels.rms_norm_quantize(x, norm, eps, floats=False)[1], weight)
        return self._kernels.linear(self._kernels.rms_norm(x, norm, eps), weight)

    def _mlp(self, weights: MlpWeights, x: Tensor, rows: Activations, residual: Tensor | None = None) -> Tensor:
        """x [T, D] float, needed where gate_up is in floats, and the same rows in INT8."""
        kernels, gate_up, down = self._kernels, weights.gate_up, weights.down
        if isinstance(gate_up, IntegerWeight) and isinstance(down, type(gate_up)):
            return kernels.mlp(rows, gate_up, down, residual)
        gate_up_rows = rows if isinstance(gate_up, IntegerWeight) else x
        return kernels.linear(kernels.silu_mul(kernels.linear(gate_up_rows, gate_up)), down, residual)

    def _branch(self, rows: int, run: Callable[[], T]) -> T:
        """`AheadKernels.branch`; other kernels run one operation after another."""
        return run() if self._ahead is None else self._ahead.branch(rows, run)

    def _join(self) -> None:
        if self._ahead is not None:
            self._ahead.join()

    def _moe(self, layer: int) -> MoeWeights:
        mlp = self.weights.layers[layer].mlp
        if not isinstance(mlp, MoeWeights):
            raise ValueError(f"layer {layer} has a dense MLP, no routed experts")
        return mlp
