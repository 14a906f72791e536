"""What each stage of a step would take on a GPU: the bytes it must read and the operations it must do.

A stage takes the longer of its bytes over the bandwidth and its operations over the matrix rate, both as attained, and
what starting it takes. Distinct experts are those of a routing that spreads: each of E is missed by a token with
probability 1 - K/E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...kernels.protocol import ActivationFormat
from ..layer_work import (
    attention_values,
    attention_weights,
    expert_weights,
    gate_weights,
    mlp_weights,
    shared_weights,
)
from .gpu import Gpu
from .workload import Workload

Attention = Literal["data", "tensor"]
_HIDDEN_BYTES = 2  # of a value of the residual stream
_SLOT_BYTES = 4  # of a value of an expert's result on its way back
_PAIR_BYTES = 8
_MICROSECONDS = 1e6


@dataclass(frozen=True)
class Batch:
    """One step. tokens: of every shard that has sequences. each: tokens of one sequence, 1 for decode. context: tokens
    that each sees on average, its own included."""

    tokens: tuple[int, ...]
    each: int
    context: float

    @staticmethod
    def decode(sequences: int, shards: int, context: int) -> Batch:
        """As many sequences, spread evenly."""
        return Batch(_spread(sequences, shards), 1, context)

    @staticmethod
    def prompts(count: int, tokens: int, shards: int) -> Batch:
        """As many whole prompts, spread evenly; a token sees half of its prompt on average."""
        return Batch(tuple(tokens * share for share in _spread(count, shards)), tokens, (tokens + 1) / 2)


@dataclass(frozen=True)
class StageCosts:
    """What the stages of `batch` take on `gpus` GPUs of a kind, in `micro_batches` of equal size.

    experts: routed experts of a layer that each shard of experts holds. attention: "data": a sequence's on one shard;
    "tensor": every shard has a part of the heads, and of shared experts, dense MLPs and head, of all sequences, and
    experts' results are summed over the shards instead of sent back.
    """

    work: Workload
    gpu: Gpu
    gpus: int
    batch: Batch
    experts: Sequence[int]
    micro_batches: int = 1
    attention: Attention = "data"

    def microseconds(self, kind: str, shard: int) -> float:
        """Of a kind of stage in any layer, or of the way of what it sends."""
        seconds = self._link(kind, shard) if kind.startswith("link.") else self._stage(kind, shard)
        return seconds * _MICROSECONDS

    def _stage(self, kind: str, shard: int) -> float:
        tokens = self._all_tokens if kind == "experts" else self._tokens(shard)
        if not tokens:
            return 0.0
        work, weights, model = self.work, self.work.weights, self.work.model
        gate_rate, parts = ActivationFormat.FLOAT, self._parts
        match kind:
            case "embed":
                return self._time(tokens * model.hidden_size * _HIDDEN_BYTES, 0, gate_rate)
            case "attention":
                return self._attention(tokens)
            case "dense":
                ops = 2 * mlp_weights(model, model.intermediate_size) * tokens / parts
                return self._time(weights.dense / parts, ops, work.activations("dense"))
            case "gate":
                return self._time(weights.gate, 2 * gate_weights(model) * tokens, gate_rate)
            case "shared":
                ops = 2 * shared_weights(model) * tokens / parts
                return self._time(weights.shared / parts, ops, work.activations("shared"))
            case "experts":
                return self._experts(tokens, self.experts[shard])
            case "combine":
                return self._time(tokens * model.hidden_size * model.num_experts_per_tok * _SLOT_BYTES, 0, gate_rate)
            case "head":
                rows = tokens / self.batch.each  # the last token of every prompt
                ops = 2 * rows * model.vocab_size * model.hidden_size / parts
                return self._time(weights.head / parts, ops, work.activations("head"))
            case _:  # dispatch and sample: no bytes to speak of
                return self._time(0, 0, gate_rate)

    def _attention(self, tokens: float) -> float:
        """Projections, and the products with the latents that are cached."""
        model, parts = self.work.model, self._parts
        ops = 2 * attention_weights(model) * tokens / parts
        projections = self._time(self.work.weights.attention / parts, ops, self.work.activations("attention"))
        cached = tokens / self.batch.each * self.batch.context * self.work.kv_entry_bytes
        ops = 2 * tokens * self.batch.context * attention_values(model) / parts
        summing = self._all_reduce(tokens) if self.attention == "tensor" else 0.0
        return projections + self._time(cached, ops, ActivationFormat.FLOAT) + summing

    def _experts(self, tokens: float, held: int) -> float:
        model = self.work.model
        visited = model.num_experts_per_tok / model.n_routed_experts
        distinct = held * (1 - (1 - visited) ** tokens)
        ops = 2 * expert_weights(model) * tokens * visited * held
        return self._time(distinct * self.work.weights.expert, ops, self.work.expert_activations)

    def _link(self, kind: str, shard: int) -> float:
        """Rows in the experts' format go out, one to each shard with any of the token's experts; a result for each of
        the token's experts comes back. Where collectives of fixed sizes carry a decode step (`FixedExchange`), a row
        goes to every shard, and every shard sends a result's place for every slot, used or not."""
        if self.gpus == 1:
            return 0.0
        if self.attention == "tensor":  # every shard has all tokens; results are summed
            return 0.0 if kind == "link.dispatch" else self._all_reduce(self._all_tokens)
        model, shards = self.work.model, len(self.experts)
        slots, fixed = model.num_experts_per_tok, self.batch.each == 1 and not self.gpu.direct
        visited = slots / model.n_routed_experts
        if kind == "link.dispatch":
            value = 2 if self.work.expert_activations is ActivationFormat.FLOAT else 1
            row = model.hidden_size * value + 4 + _PAIR_BYTES * slots / shards
            reaches = 1 if fixed else 1 - (1 - visited) ** (model.n_routed_experts / shards)
            a_peer = self._tokens(shard) * reaches * row
        else:
            a_token = slots if fixed else visited * self.experts[shard]
            a_peer = max(self.batch.tokens) / self.micro_batches * a_token * model.hidden_size * _SLOT_BYTES
        return self.gpu.exchange_seconds(a_peer, self.gpus) + self.gpu.exchange_us / _MICROSECONDS

    def _all_reduce(self, tokens: float) -> float:
        """Reduce-scatter and all-gather of the residual stream's rows."""
        if self.gpus == 1:
            return 0.0
        a_peer = tokens * self.work.model.hidden_size * _HIDDEN_BYTES / self.gpus
        return 2 * self.gpu.exchange_seconds(a_peer, self.gpus) + self.gpu.exchange_us / _MICROSECONDS

    def _time(self, read: float, ops: float, activations: ActivationFormat) -> float:
        attained = self.gpu.attained
        moving = read / (self.gpu.bandwidth * attained.bandwidth)
        computing = ops / (self.gpu.rates.of(activations) * attained.matrix)
        return max(moving, computing) + attained.stage_us / _MICROSECONDS

    def _tokens(self, shard: int) -> float:
        """Of one micro-batch, that a shard computes attention for."""
        if self.attention == "tensor":
            return self._all_tokens
        return self.batch.tokens[shard] / self.micro_batches

    @property
    def _all_tokens(self) -> float:
        return sum(self.batch.tokens) / self.micro_batches

    @property
    def _parts(self) -> int:
        return self.gpus if self.attention == "tensor" else 1


def _spread(count: int, shards: int) -> tuple[int, ...]:
    share, more = divmod(count, shards)
    return tuple(share + (shard < more) for shard in range(shards))


__all__ = ["Attention", "Batch", "StageCosts"]
