"""What a shard computes with: kernels that were checked, its part of the weights, and its KV pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..kernels.protocol import Kernels
from .checkpoint import Checkpoint
from .device_memory import fitting_pages
from .model.config import ModelConfig
from .model.kv_pages import KvPages
from .model.layer_weights import MoeWeights, ShardWeights
from .model.stages import ModelStages
from .random_weights import random_shard
from .shard_check import check_kernels
from .shard_start import ShardStart
from .weights import load_shard


@dataclass(frozen=True)
class ShardModel:
    """bytes_read: for the weights. kv_pages: in the cache. checks: as in `ShardReport`."""

    stages: ModelStages
    bytes_read: int
    kv_pages: int
    checks: tuple[str, ...]

    @staticmethod
    def load(
        start: ShardStart, config: ModelConfig, kernels: Kernels, on_progress: Callable[[int, int], None]
    ) -> ShardModel:
        """Raises what is wrong with the checkpoint or a kernel. on_progress: as in `load_shard`."""
        weights, bytes_read = _weights(start, config, kernels, on_progress)
        checks = check_kernels(kernels, config, weights, start.page_size, start.prompt_attention)
        kv = KvPages.allocate(config, _pages(start, config, kernels, weights), start.page_size, kernels)
        stages = ModelStages(config, weights, kernels, kv, start.prompt_attention)
        return ShardModel(stages, bytes_read, kv.num_pages, checks)


def _weights(
    start: ShardStart, config: ModelConfig, kernels: Kernels, on_progress: Callable[[int, int], None]
) -> tuple[ShardWeights, int]:
    """The shard's weights, and how many bytes were read for them."""
    mine, rounded = start.placement.held[start.shard], (start.int8_weights, start.int4_weights)
    tensor = start.tensor[start.shard] if start.tensor else None
    if start.weights == "random":
        return random_shard(config, start.precision, mine, kernels, *rounded, tensor=tensor), 0
    checkpoint = Checkpoint(start.model_path)
    weights = load_shard(
        checkpoint, config, start.precision, mine, kernels, on_progress, start.threads, *rounded, tensor=tensor
    )
    return weights, checkpoint.bytes_read


def _pages(start: ShardStart, config: ModelConfig, kernels: Kernels, weights: ShardWeights) -> int:
    """How many KV pages the shard has. Where experts move, one layer's may come at once, beside those there."""
    if not start.kv_memory_share:
        return start.kv_pages
    page_bytes = KvPages.page_bytes(config, start.page_size, kernels)
    layers = [layer.mlp.experts.bytes for layer in weights.layers if isinstance(layer.mlp, MoeWeights)]
    kept = max(layers, default=0) if start.moves else 0
    return min(start.kv_pages, fitting_pages(kernels.device, start.kv_memory_share, page_bytes, kept))
