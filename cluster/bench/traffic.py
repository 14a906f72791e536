"""What a decode step must at least read: the weights that its tokens touch, and their KV cache. The floor of its time.

The embedding and activations are left out: they are below a hundredth of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...actors.linear_kinds import LINEAR_KINDS
from ...actors.model.config import ModelConfig
from ..weight_bytes import shard_weight_bytes, weight_bytes

_KV_BYTES = 4


@dataclass(frozen=True)
class LinearBits:
    """Kinds of weights beside the routed experts (`LINEAR_KINDS`) in INT8 and in INT4; others are bfloat16."""

    int8: tuple[str, ...] = ()
    int4: tuple[str, ...] = ()

    @staticmethod
    def of(format: str) -> LinearBits:
        """What goes with a format of the experts, where nothing else is asked: as few bits as they have, but not the
        head below 8, which is also what llama.cpp's 4-bit models do."""
        *inner, head = LINEAR_KINDS
        return LinearBits((head,), tuple(inner)) if format == "w4a8" else LinearBits(tuple(LINEAR_KINDS))

    def __str__(self) -> str:
        words = [f"{', '.join(kinds)} in {name}" for name, kinds in (("INT4", self.int4), ("INT8", self.int8)) if kinds]
        return ", ".join(words) or "all in bfloat16"


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one decode step reads."""

    experts: int
    others: int
    cache: int

    @property
    def total(self) -> int:
        return self.experts + self.others + self.cache


def step_traffic(
    config: ModelConfig,
    format: str,
    linears: LinearBits,
    touched: float,
    batch: int,
    context: int,
) -> StepTraffic:
    """Bytes of a step of `batch` sequences with `context` tokens each in the cache.

    format: of the routed experts in memory. touched: distinct experts a layer. Raises ValueError for a format whose
    size is not known here.
    """
    weights = weight_bytes(config, format, linears.int8, linears.int4, tiled=False)
    beside = shard_weight_bytes(config, weights, 0) - weights.embedding
    cache = config.num_hidden_layers * batch * context * config.kv_width * _KV_BYTES
    return StepTraffic(round(len(config.moe_layers) * touched * weights.expert), beside, cache)
