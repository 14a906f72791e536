"""What each stage of a step would take on a GPU: the bytes it must read and the operations it must do.

A stage takes the longer of its bytes over the bandwidth and its operations over the matrix rate, both as attained, and
what starting it takes. Distinct experts are those of a routing that spreads: each of E is missed by a token with
probability 1 - K/E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ...kernels.protocol import ActivationFormat
from ..layer_work import (
    attention_values,
    attention_weights,
    expert_weights,
    gate_weights,
    head_weights,
    mlp_weights,
    output_weights,
    shared_weights,
)
from ..weight_bytes import WeightBytes
from .gpu import Gpu
from .workload import Workload

Attention = Literal["data", "tensor"]
_HIDDEN_BYTES = 2  # of a value of the residual stream
_SLOT_BYTES = 4  # of a value of a result that travels: an expert's, a head's, a logit
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
    "tensor": every shard has all sequences, and computes a part of the heads and of the logits of each, and the rest
    whole; every shard's results then go to all shards.
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
        tokens = self._all_tokens if kind in ("experts", "own_experts") else self._tokens(shard)
        if not tokens:
            return 0.0
        work, weights, model = self.work, self._weights, self.work.model
        gate_rate = ActivationFormat.FLOAT
        match kind:
            case "embed":
                return self._time(tokens * model.hidden_size * _HIDDEN_BYTES, 0, gate_rate)
            case "attention" | "own_heads":
                return self._attention(tokens)
            case "output":  # what starting it takes is in that of the heads
                ops = 2 * output_weights(model) * tokens
                return self._work(weights.attention * self._output_share, ops, work.activations("attention"))
            case "dense":
                ops = 2 * mlp_weights(model, model.intermediate_size) * tokens
                return self._time(weights.dense, ops, work.activations("dense"))
            case "gate":
                return self._time(weights.gate, 2 * gate_weights(model) * tokens, gate_rate)
            case "shared":
                return self._time(weights.shared, 2 * shared_weights(model) * tokens, work.activations("shared"))
            case "experts":
                return self._experts(tokens, self.experts[shard])
            case "own_experts":  # to find its pairs takes a shard what to dispatch them does
                return self._time(0, 0, gate_rate) + self._experts(tokens, self.experts[shard])
            case "combine":
                return self._time(tokens * model.hidden_size * model.num_experts_per_tok * _SLOT_BYTES, 0, gate_rate)
            case "head" | "own_logits":
                ops = 2 * self._rows(tokens) * model.vocab_size * model.hidden_size / self._parts
                return self._time(weights.head, ops, work.activations("head"))
            case "logits":
                return self._work(0, 0, gate_rate)
            case _:  # dispatch and sample: no bytes to speak of
                return self._time(0, 0, gate_rate)

    def _attention(self, tokens: float) -> float:
        """Projections, and the products with the latents that are cached."""
        model, parts = self.work.model, self._parts
        divided = head_weights(model)
        computed = attention_weights(model) - divided + divided / parts
        if self.attention == "tensor":
            computed -= output_weights(model)
        read = self._weights.attention * (1 - self._output_share)
        projections = self._time(read, 2 * computed * tokens, self.work.activations("attention"))
        cached = tokens / self.batch.each * self.batch.context * self.work.kv_entry_bytes
        ops = 2 * tokens * self.batch.context * attention_values(model) / parts
        return projections + self._time(cached, ops, ActivationFormat.FLOAT)

    @property
    def _output_share(self) -> float:
        """The output projection's share of the attention's bytes, where it is a stage of its own."""
        model = self.work.model
        if self.attention == "data":
            return 0.0
        divided = head_weights(model)
        return output_weights(model) / (attention_weights(model) - divided + divided / self.gpus)

    @cached_property
    def _weights(self) -> WeightBytes:
        """Of a shard."""
        return self.work.sliced_weights(self.gpus) if self.attention == "tensor" else self.work.weights

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
        if self.attention == "tensor":
            return self._to_all(kind)
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

    def _to_all(self, kind: str) -> float:
        """Every shard's heads or logits to all others. Of the experts' results the bits are summed, as
        `CollectiveGather` does, which takes each shard's way twice."""
        model, tokens = self.work.model, self._all_tokens
        values = {
            "link.heads": tokens * model.num_attention_heads * model.v_head_dim,
            "link.combine": 2 * tokens * model.num_experts_per_tok * model.hidden_size,
            "link.logits": self._rows(tokens) * model.vocab_size,
        }[kind]
        a_peer = values * _SLOT_BYTES / self.gpus
        return self.gpu.exchange_seconds(a_peer, self.gpus) + self.gpu.exchange_us / _MICROSECONDS

    def _rows(self, tokens: float) -> float:
        """That need logits: the last token of every prompt."""
        return tokens / self.batch.each

    def _time(self, read: float, ops: float, activations: ActivationFormat) -> float:
        return self._work(read, ops, activations) + self.gpu.attained.stage_us / _MICROSECONDS

    def _work(self, read: float, ops: float, activations: ActivationFormat) -> float:
        attained = self.gpu.attained
        moving = read / (self.gpu.bandwidth * attained.bandwidth)
        computing = ops / (self.gpu.rates.of(activations) * attained.matrix)
        return max(moving, computing)

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
