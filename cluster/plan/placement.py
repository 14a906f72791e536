"""The ways of spreading a model over GPUs, what fits each GPU's memory, and which is fastest in simulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ...actors.engine_config import GPU_MEMORY_UTILIZATION, expert_ranges
from ...actors.sequence import (
    ATTENTION,
    COLOCATED,
    DATA_PARALLEL,
    DISAGGREGATED,
    EXPERTS,
    TENSOR_PARALLEL,
    LayerPlan,
    Placement,
    StageProgram,
    sequence,
)
from ...actors.sequence import Attention as EngineAttention
from ...actors.simulate import simulate
from ..weight_bytes import shard_weight_bytes
from .buffers import step_buffers
from .gpu import Gpu, PlanError
from .stage_costs import Attention, Batch, StageCosts
from .workload import Workload

MICRO_BATCHES = (1, 2, 4)
ATTENTIONS: dict[Attention, EngineAttention] = {"data": DATA_PARALLEL, "tensor": TENSOR_PARALLEL}
"""The words of `engine.attention`."""


@dataclass(frozen=True)
class Spread:
    """One way. holders: GPUs with attention and all beside the routed experts; others have routed experts alone, in the
    "disaggregated" placement. micro_batches: of a step; a smaller batch has as many as sequences."""

    placement: Placement
    holders: int
    micro_batches: int
    attention: Attention

    @property
    def runs(self) -> bool:
        """Whether flyray's engine runs it, or it is a simulation alone."""
        return (self.placement, self.micro_batches) == (COLOCATED, 1)

    def __str__(self) -> str:
        if self.attention == "tensor":
            return "tensor-parallel"
        where = f"{self.holders} GPUs attention" if self.placement == DISAGGREGATED else "colocated"
        return f"{where}, {self.micro_batches} micro-batches" if self.micro_batches > 1 else where


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of the fullest GPU of a spread. routed: of the weights, those of routed experts. usable: what weights and
    KV pages may fill together. caches: that hold sequences of their own, each of cache_tokens, 0 where the weights do
    not fit; token_bytes: of a token in one. buffers: what the largest decode step takes beside all that."""

    weights: int
    routed: int
    usable: int
    caches: int
    cache_tokens: int
    token_bytes: int
    buffers: int

    @property
    def kv_tokens(self) -> int:
        """Of all caches together."""
        return self.caches * self.cache_tokens

    @property
    def cache_bytes(self) -> int:
        """Of one GPU's cache."""
        return self.cache_tokens * self.token_bytes

    def sequences(self, context: int) -> int:
        """That fit at once, of so many tokens each: a sequence is in one cache."""
        return self.caches * (self.cache_tokens // context)


def spreads(gpus: int) -> Iterator[Spread]:
    """All ways that are compared, first what the engine runs unless it is told otherwise."""
    for micro_batches in MICRO_BATCHES:
        yield Spread(COLOCATED, gpus, micro_batches, "data")
    if gpus > 1:
        yield Spread(COLOCATED, gpus, 1, "tensor")
    for holders in range(1, gpus):
        for micro_batches in MICRO_BATCHES:
            yield Spread(DISAGGREGATED, holders, micro_batches, "data")


def held_experts(work: Workload, gpus: int, spread: Spread) -> tuple[int, ...]:
    """Routed experts of a layer on every GPU that has any. Raises PlanError for more GPUs than experts."""
    shards = gpus if spread.placement == COLOCATED else gpus - spread.holders
    try:
        return tuple(len(experts) for experts in expert_ranges(work.model.n_routed_experts, shards))
    except ValueError as error:
        raise PlanError(f"gpus: {gpus}: {error}") from error


def memory(work: Workload, gpu: Gpu, gpus: int, spread: Spread) -> GpuMemory:
    """What lies on the fullest GPU; the others' caches are counted as large as its."""
    weights, model, experts = work.weights, work.model, max(held_experts(work, gpus, spread))
    usable = int(gpu.memory * GPU_MEMORY_UTILIZATION)
    routed = len(model.moe_layers) * experts * weights.expert
    if spread.placement == DISAGGREGATED:
        beside = shard_weight_bytes(model, weights, 0)
        fits = routed <= usable
        fullest = max(beside, routed)
    elif spread.attention == "tensor":
        fits = gpus <= model.num_attention_heads
        beside = fullest = shard_weight_bytes(model, work.sliced_weights(gpus), experts) if fits else 0
    else:
        beside = fullest = shard_weight_bytes(model, weights, experts)
        fits = True
    caches = 1 if spread.attention == "tensor" else spread.holders  # every GPU has all sequences' latents
    room = max(0, usable - beside) if fits else 0
    tokens, buffers = room // work.kv_token_bytes, step_buffers(model, gpu, gpus)
    return GpuMemory(fullest, routed, usable, caches, tokens, work.kv_token_bytes, buffers)


def step_us(work: Workload, gpu: Gpu, gpus: int, spread: Spread, batch: Batch) -> float:
    """Microseconds of a step in simulation, with what it takes outside its layers."""
    sequences = max(batch.tokens) // batch.each
    micro_batches = min(spread.micro_batches, max(1, sequences))
    costs = StageCosts(work, gpu, gpus, batch, held_experts(work, gpus, spread), micro_batches, spread.attention)
    roles = {COLOCATED: gpus}
    if spread.placement == DISAGGREGATED:
        roles = {ATTENTION: spread.holders, EXPERTS: gpus - spread.holders}
    layers = LayerPlan(work.model.num_hidden_layers, work.model.first_k_dense_replace)
    cost = cache(costs.microseconds)  # of every layer alike
    program = _program(layers, spread.placement, micro_batches, ATTENTIONS[spread.attention])
    return simulate(program, lambda kind, stage, shard: cost(kind, shard), roles).duration + gpu.attained.step_us


def layer_us(work: Workload, gpu: Gpu, gpus: int, batch: Batch) -> float:
    """Microseconds of one MoE layer on the fullest GPU as the engine runs it, what travels included."""
    own = next(spreads(gpus))
    costs = StageCosts(work, gpu, gpus, batch, held_experts(work, gpus, own))
    kinds = ("attention", "gate", "dispatch", "shared", "experts", "combine")
    travel = ("link.dispatch", "link.combine") if gpus > 1 else ()
    return sum(costs.microseconds(kind, 0) for kind in (*kinds, *travel))


@cache
def _program(layers: LayerPlan, placement: Placement, micro_batches: int, attention: EngineAttention) -> StageProgram:
    return sequence(layers, placement, micro_batches, attention)
