"""What is gathered of a model's routed experts: the sizes, layers and files of a statistics folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .checkpoint import Checkpoint
from .model.config import ModelConfig

VERSION = 1


class StatisticsError(ValueError):
    """Statistics that cannot be used, or a folder that cannot take them; the message names the file and what to do."""


@dataclass(frozen=True)
class StatisticsPlan:
    """What is gathered of a model.

    fingerprint: `fingerprint` of the model. precision: that the engine runs. layers: those with routed experts.
    experts: every shard's range of each layer's. top_k: experts of a token. hidden_size: D, of an expert's input;
    inner_size: I, of down_proj's. moments_block: B columns of each diagonal block of the second moments, 0 for none.
    """

    fingerprint: str
    precision: str
    layers: tuple[int, ...]
    experts: tuple[range, ...]
    top_k: int
    hidden_size: int
    inner_size: int
    moments_block: int

    @staticmethod
    def of(
        checkpoint: Checkpoint, model: ModelConfig, experts: Sequence[range], precision: str, moments_block: int
    ) -> StatisticsPlan:
        """Raises ValueError for a moments_block that does not divide the model's sizes."""
        plan = StatisticsPlan(
            fingerprint=fingerprint(checkpoint, model),
            precision=precision,
            layers=tuple(model.moe_layers),
            experts=tuple(experts),
            top_k=model.num_experts_per_tok,
            hidden_size=model.hidden_size,
            inner_size=model.moe_intermediate_size,
            moments_block=moments_block,
        )
        for size, name in ((plan.hidden_size, "hidden_size"), (plan.inner_size, "moe_intermediate_size")):
            if moments_block and size % min(moments_block, size):
                raise ValueError(f"moments_block: {moments_block} does not divide {name} {size}")
        return plan

    @property
    def num_experts(self) -> int:
        return self.experts[-1].stop

    def file(self, layer: int, shard: int) -> str:
        """The name of a layer's file of one shard."""
        return f"layer-{layer:03d}-shard-{shard:03d}-of-{len(self.experts):03d}.safetensors"

    def tensors(self, shard: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor in a shard's files; those of 8 bytes first, so that all are aligned."""
        local, hidden, inner = len(self.experts[shard]), self.hidden_size, self.inner_size
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "count": (torch.int64, (local,)),
            "input_energy": (torch.float64, (local, hidden)),
            "inner_energy": (torch.float64, (local, inner)),
        }
        if self.moments_block:
            shapes["input_moments"] = (torch.float64, self.blocks(hidden))
            shapes["inner_moments"] = (torch.float64, (local, *self.blocks(inner)))
        return shapes | {
            "input_absmax": (torch.float32, (local, hidden)),
            "inner_absmax": (torch.float32, (local, inner)),
        }

    def blocks(self, size: int) -> tuple[int, int, int]:
        """Shape of the diagonal blocks of `size` columns: [size / B, B, B], one of all columns if there are fewer."""
        block = min(self.moments_block, size)
        return size // block, block, block

    def record(self, tokens: int, complete: bool) -> dict[str, Any]:
        """The content of statistics.json."""
        experts = [[each.start, each.stop] for each in self.experts]
        values = asdict(self) | {"layers": list(self.layers), "experts": experts}
        return {"version": VERSION, **values, "tokens": tokens, "complete": complete}

    @staticmethod
    def parse(record: dict[str, Any]) -> StatisticsPlan:
        """What `record` wrote. Raises KeyError, TypeError or ValueError."""
        bounds = [(int(first), int(stop)) for first, stop in record["experts"]]
        starts, stops = [first for first, _ in bounds], [stop for _, stop in bounds]
        if not bounds or starts != [0, *stops[:-1]] or any(first >= stop for first, stop in bounds):
            raise ValueError(f"experts: {record['experts']} are not ranges that follow each other from 0")
        plan = StatisticsPlan(
            fingerprint=str(record["fingerprint"]),
            precision=str(record["precision"]),
            layers=tuple(int(layer) for layer in record["layers"]),
            experts=tuple(range(first, stop) for first, stop in bounds),
            top_k=int(record["top_k"]),
            hidden_size=int(record["hidden_size"]),
            inner_size=int(record["inner_size"]),
            moments_block=int(record["moments_block"]),
        )
        if min(plan.top_k, plan.hidden_size, plan.inner_size) < 1 or plan.moments_block < 0:
            raise ValueError("top_k, hidden_size and inner_size must be above 0, moments_block not below")
        return plan


def fingerprint(checkpoint: Checkpoint, model: ModelConfig | None = None) -> str:
    """SHA-256 over what config.json says of the text model, and the names of its modules.

    It does not depend on formats: of the configuration it takes the fields of `ModelConfig`, which are without
    quantization and exporters' notes, and of tensors the modules' names. Raises ConfigError.
    """
    model = model or ModelConfig.from_dict(checkpoint.config)
    modules = {name.rpartition(".")[0] for name in checkpoint.names if name.startswith(("model.", "lm_head."))}
    content = json.dumps([asdict(model), sorted(modules)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
