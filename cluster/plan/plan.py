"""`flyray plan`: how many GPUs a model needs, what it would do on them, and what each count of GPUs would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .disk import DiskBytes
from .gpu import Gpu, PlanError
from .placement import GpuMemory, Spread, layer_us, memory, spreads, step_us
from .stage_costs import Batch
from .workload import Workload

MOST_GPUS = 64


@dataclass(frozen=True)
class Decoding:
    """A decode step of `batch` sequences in microseconds: as the engine runs it, of the fastest way there is, and the
    floor: the engine's way with all that the GPU's maker publishes reached. layer_us: of one MoE layer. tensor_us: with
    engine.attention "tensor_parallel"; 0 where there is one GPU, or it does not fit."""

    batch: int
    us: float
    layer_us: float
    floor_us: float
    tensor_us: float
    fastest: Spread
    fastest_us: float

    @property
    def tokens_a_second(self) -> float:
        """Of all sequences, as the engine runs it."""
        return self.batch / self.us * 1e6


@dataclass(frozen=True)
class CountPlan:
    """A model on `gpus` GPUs. decoding: of every batch that the cache holds. prefill_us: of one prompt,
    prefill_all_us of one on every GPU at once, and prefill_tensor_us of one with engine.attention "tensor_parallel"; 0
    where the weights do not fit, or there is one GPU."""

    gpus: int
    memory: GpuMemory
    decoding: tuple[Decoding, ...]
    prefill_us: float
    prefill_all_us: float
    prefill_tensor_us: float

    @property
    def fits(self) -> bool:
        """Whether weights and the cache of a token do."""
        return self.memory.kv_tokens > 0


@dataclass(frozen=True)
class Plan:
    """model: its name. disk: its checkpoint. least: the fewest GPUs on which the weights and one sequence of the
    context fit. counts: as asked for."""

    model: str
    disk: DiskBytes
    gpu: Gpu
    work: Workload
    least: int
    counts: tuple[CountPlan, ...]


def make_plan(
    model: str, disk: DiskBytes, work: Workload, gpu: Gpu, counts: Sequence[int], batches: Sequence[int]
) -> Plan:
    """counts: numbers of GPUs; batches: sequences that decode at once. Raises PlanError where not even 64 GPUs hold
    the model with one sequence, or a count is above its experts."""
    each = tuple(_count(work, gpu, count, batches) for count in sorted(set(counts)))
    return Plan(model, disk, gpu, work, least_gpus(work, gpu), each)


def least_gpus(work: Workload, gpu: Gpu) -> int:
    """The fewest that hold the weights and a sequence of the context. Raises PlanError where 64 do not."""
    for count in range(1, min(MOST_GPUS, work.model.n_routed_experts) + 1):
        if memory(work, gpu, count, next(spreads(count))).sequences(work.context):
            return count
    raise PlanError(
        f"gpu: {gpu.name}: the model and one sequence of {work.context} tokens do not fit "
        f"{min(MOST_GPUS, work.model.n_routed_experts)} of them: every GPU holds all weights beside the routed experts"
    )


def _count(work: Workload, gpu: Gpu, gpus: int, batches: Sequence[int]) -> CountPlan:
    own = next(spreads(gpus))
    room = memory(work, gpu, gpus, own)
    if not room.kv_tokens:
        return CountPlan(gpus, room, (), 0.0, 0.0, 0.0)
    decoding = tuple(_decoding(work, gpu, gpus, batch) for batch in batches if batch <= room.sequences(work.context))
    alone, every = (step_us(work, gpu, gpus, own, Batch.prompts(count, work.prefill, gpus)) for count in (1, gpus))
    tensor = next((way for way in spreads(gpus) if way.runs and way != own), None)
    together = step_us(work, gpu, gpus, tensor, Batch.prompts(1, work.prefill, 1)) if tensor else 0.0
    return CountPlan(gpus, room, decoding, alone, every, together)


def _decoding(work: Workload, gpu: Gpu, gpus: int, batch: int) -> Decoding:
    times: dict[Spread, float] = {}
    for spread in spreads(gpus):
        if memory(work, gpu, gpus, spread).sequences(work.context) >= batch:
            step = Batch.decode(batch, 1 if spread.attention == "tensor" else spread.holders, work.context)
            times[spread] = step_us(work, gpu, gpus, spread, step)
    own = next(spreads(gpus))
    step = Batch.decode(batch, gpus, work.context)
    floor = step_us(work, gpu.ideal, gpus, own, step)
    tensor = next((times[each] for each in times if each.runs and each != own), 0.0)
    fastest = min(times, key=lambda spread: times[spread])
    return Decoding(batch, times[own], layer_us(work, gpu, gpus, step), floor, tensor, fastest, times[fastest])
