"""Whether a model fits this machine as it is to be served: what `flyray plan` counts, against what is free here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...actors.engine_config import CPU_KV_MEMORY, GPU_MEMORY_UTILIZATION, EngineConfig
from ...actors.expert_placement import LayerPlacement
from ...actors.model.tensor_slice import TensorSlice
from ...actors.sequence import DATA_PARALLEL, TENSOR_PARALLEL, Attention
from ...kernels.select import ACCELERATED
from ..config import FlyrayConfig
from ..figures import Figure
from ..plan.command import PlannedModel, read_model, workload
from ..plan.gpu import Gpu, gpus
from ..plan.placement import ATTENTIONS, Spread, memory, spreads
from ..plan.plan import PlanError, least_gpus
from ..plan.workload import Workload
from ..weight_bytes import shard_weight_bytes, weight_bytes
from .devices import SeenGpu, published
from .finding import Finding

_ABOUT = "memory against the plan"
_GB = 1e9
_CPU_KV_DTYPE = "f32"
_FULL = 0.9  # of a machine's memory, with which it still has some for pages of files


@dataclass(frozen=True)
class Demand:
    """What is to be served. share: of a GPU's memory that weights and pages may fill; kv_memory: bytes of each shard's
    pages instead, 0 for what the share leaves. attention, redundant_experts: as in `EngineConfig`."""

    model: PlannedModel
    work: Workload
    shards: int
    accelerated: bool
    share: float
    kv_memory: int
    attention: Attention = DATA_PARALLEL
    redundant_experts: int = 0

    @staticmethod
    def of_config(config: FlyrayConfig) -> Demand:
        """Raises PlanError or CheckpointError."""
        engine = config.engine_config()
        model, accelerated = read_model(engine.model_path), engine.backend in ACCELERATED
        format = "" if engine.precision == "auto" else engine.precision
        auto = "bf16" if accelerated else _CPU_KV_DTYPE
        kv_dtype = auto if engine.kv_dtype == "auto" else engine.kv_dtype
        kinds = engine.int8_weights, engine.int4_weights
        work = workload(model, format, *kinds, engine.context_length, 0, kv_dtype)
        memory = engine.kv_memory_share, _kv_memory(engine)
        return Demand(model, work, engine.shards, accelerated, *memory, engine.attention, engine.redundant_experts)

    @staticmethod
    def of_model(model: str, gpus: int) -> Demand:
        """On all GPUs here, or on CPUs in one shard. Raises PlanError, SynthesizeError or CheckpointError."""
        found = read_model(model)
        work = workload(found, "", (), (), 0, 0, "bf16" if gpus else _CPU_KV_DTYPE)
        share, kv_memory = (GPU_MEMORY_UTILIZATION, 0) if gpus else (0.0, CPU_KV_MEMORY)
        return Demand(found, work, max(1, gpus), bool(gpus), share, kv_memory)


def check_fit(demand: Demand, seen: Sequence[SeenGpu], available: int) -> Iterator[Finding]:
    """seen: the GPUs that torch sees. available: bytes of this machine's memory."""
    if not demand.accelerated:
        yield _fit_cpu(demand, available)
        return
    if len(seen) < demand.shards:
        yield Finding(
            _ABOUT,
            "warning",
            f"{demand.shards} shards need a GPU each, {len(seen)} are seen here: the rest must be on other nodes",
        )
    for gpu in seen[: demand.shards]:
        yield _fit_gpu(demand, gpu)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that a process can have without swapping: the machine's, or less in a container."""
    fields = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    group = root / "sys/fs/cgroup"
    limit = group / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        used = int((group / "memory.current").read_text())
        free = min(free, int(most) - used)
    return free


def _fit_gpu(demand: Demand, seen: SeenGpu) -> Finding:
    known = published(seen.name) or next(iter(gpus().values()))
    room = memory(demand.work, known.model_copy(update={"memory": seen.total}), demand.shards, _spread(demand))
    about, weights = f"{_ABOUT}, GPU {seen.number}", room.weights + _redundant_bytes(demand)
    pages = demand.kv_memory or int(seen.total * demand.share) - weights
    needed = weights + max(pages, demand.work.kv_token_bytes) + room.buffers
    figure = Figure(f"planned_bytes.gpu{seen.number}", needed, "bytes")
    text = f"{demand.work.format} on {_shards(demand)}: {weights / _GB:.2f} GB of weights"
    if pages < demand.work.kv_token_bytes:
        text += f" of {seen.total / _GB:.2f} GB: no room for a cache; {_more(demand, known, seen.total)}"
        return Finding(about, "fault", text, (figure,))
    tokens = pages // demand.work.kv_token_bytes
    text += f", {tokens:,} tokens of cache, {room.buffers / _GB:.2f} GB for a step: {needed / _GB:.2f} of "
    text += f"{seen.free / _GB:.2f} free"
    if needed > seen.free:
        taken = seen.total - seen.free
        return Finding(
            about,
            "fault",
            f"{text}; {taken / _GB:.2f} GB are taken: end who has them, or lower engine.gpu_memory_utilization",
            (figure,),
        )
    return Finding(about, "ok", text, (figure,))


def _fit_cpu(demand: Demand, available: int) -> Finding:
    work, model = demand.work, demand.work.model
    slices = TensorSlice.all_of(model, demand.shards) if demand.attention == TENSOR_PARALLEL else [None] * demand.shards
    placement = LayerPlacement.contiguous(model.n_routed_experts, demand.shards, demand.redundant_experts)
    weights = 0
    for experts, tensor in zip(placement.sizes, slices, strict=True):
        each = weight_bytes(model, work.format, work.int8_weights, work.int4_weights, tiled=False, tensor=tensor)
        weights += shard_weight_bytes(model, each, experts)
    needed = weights + demand.shards * demand.kv_memory
    figure = Figure("planned_bytes.cpu", needed, "bytes")
    text = (
        f"{work.format} on {_shards(demand)}: {weights / _GB:.2f} GB of weights and "
        f"{demand.shards * demand.kv_memory / _GB:.2f} of cache, of {available / _GB:.2f} GB available"
    )
    if needed > available:
        text += "; fewer shards hold fewer copies of attention, int8_weights and int4_weights halve and quarter it"
        return Finding(_ABOUT, "fault", text, (figure,))
    if needed > _FULL * available:
        return Finding(_ABOUT, "warning", f"{text}; the system has little left for its files", (figure,))
    return Finding(_ABOUT, "ok", text, (figure,))


def _more(demand: Demand, gpu: Gpu, total: int) -> str:
    try:
        context = replace(demand.work, context=1)
        return f"{least_gpus(context, gpu.model_copy(update={'memory': total}))} shards are the least"
    except PlanError as error:
        return str(error)


def _shards(demand: Demand) -> str:
    return f"{demand.shards} shard{'s' if demand.shards > 1 else ''}"


def _spread(demand: Demand) -> Spread:
    """As the engine runs it."""
    wanted = (way for way in spreads(demand.shards) if way.runs and ATTENTIONS[way.attention] == demand.attention)
    return next(wanted, next(spreads(demand.shards)))  # alone, a shard has all heads either way


def _redundant_bytes(demand: Demand) -> int:
    """Of a GPU's slots for experts that others have too."""
    return len(demand.work.model.moe_layers) * demand.redundant_experts * demand.work.weights.expert


def _kv_memory(engine: EngineConfig) -> int:
    """Bytes of each shard's pages; 0 where a share of its GPU decides."""
    if engine.kv_memory_share:
        return 0
    return engine.kv_memory_bytes or CPU_KV_MEMORY
