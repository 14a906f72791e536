"""What a shard is told when it starts, and what it then says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.composition import KernelPlan
from .expert_placement import LayerPlacement
from .link import LinkKeys, LinkPlace
from .model.prompt_attention import PromptAttention
from .model.tensor_slice import TensorSlice
from .sequence import StageProgram


@dataclass(frozen=True)
class ShardStart:
    """All that one shard must know. Fields of the same names as in EngineConfig mean the same.

    placement: of every layer's experts at first. tensor: every shard's slice with tensor-parallel attention, else none.
    moves: whether experts will be moved. moved: layers with other places by now, after change `move`. kv_pages: as
    many, or at most, if kv_memory_share of the device's memory decides; 0 for no share. plan_address: the router's
    socket for this shard; place: where to bind its own.
    """

    engine: str
    epoch: int
    shard: int
    model_path: str
    precision: str
    weights: str
    int8_weights: tuple[str, ...]
    int4_weights: tuple[str, ...]
    backend: str
    kernel_plan: KernelPlan | None
    threads: int
    placement: LayerPlacement
    tensor: tuple[TensorSlice, ...]
    moves: bool
    kv_pages: int
    kv_memory_share: float
    kv_dtype: str
    prompt_attention: PromptAttention
    page_size: int
    programs: tuple[StageProgram, ...]
    plan_address: str
    place: LinkPlace
    keys: LinkKeys | None
    timeout_s: float
    silence_s: float
    moved: tuple[tuple[int, LayerPlacement], ...] = ()
    move: int = 0

    @property
    def answers(self) -> bool:
        """Whether the router hears from this shard what sequences are told."""
        return not (self.tensor and self.shard)


@dataclass(frozen=True)
class ShardReport:
    """What a shard says when it is ready. kv_pages: in its cache. checks: a line for each kernel compared with the
    reference."""

    shard: int
    kv_pages: int
    bytes_read: int
    seconds: float
    checks: tuple[str, ...]


@dataclass(frozen=True)
class ShardStats:
    """sequences: that live on the shard. dropped: messages of another engine or epoch, or of none."""

    shard: int
    steps: int
    sequences: int
    dropped: int
    error: str
