"""What a decode step must at least read: the weights that its tokens touch, and their KV cache. The floor of its time.

Norms, scales' padding and activations are left out: they are below a hundredth of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...actors.linear_kinds import LINEAR_KINDS
from ...actors.model.config import ModelConfig
from ...actors.model.tensors import TensorSpec, attention_tensors, expert_shapes, mlp_tensors, outer_tensors

_KV_BYTES = 4
_GROUP = 32


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
    formats = {LINEAR_KINDS[word]: "w8a8" for word in linears.int8}
    formats |= {LINEAR_KINDS[word]: "w4a8" for word in linears.int4}
    experts = sum(matrix_bytes(format, *shape) for shape in expert_shapes(config).values())
    specs = [spec for layer in range(config.num_hidden_layers) for spec in attention_tensors(config, layer)]
    specs += [spec for layer in range(config.num_hidden_layers) for spec in mlp_tensors(config, layer)]
    specs += [spec for spec in outer_tensors(config) if spec.kind == "lm_head"]
    return StepTraffic(
        round(len(config.moe_layers) * touched * experts),
        sum(_linear_bytes(spec, formats) for spec in specs),
        config.num_hidden_layers * batch * context * config.kv_width * _KV_BYTES,
    )


def matrix_bytes(format: str, rows: int, columns: int) -> int:
    """Bytes of a matrix in memory. Raises ValueError for a format whose size is not known here."""
    if format == "w4a8":
        return rows * (columns // 2 + columns // _GROUP + 4)
    if format in ("w8a8", "w8a8-fp8", "w4a8-channel"):
        return rows * (columns + 4)
    if format in ("bf16", "w4a16"):
        return 2 * rows * columns
    raise ValueError(f"format {format!r}: its bytes are not known")


def _linear_bytes(spec: TensorSpec, formats: Mapping[str, str]) -> int:
    shape = spec.shapes[0]
    if spec.kind not in formats or len(shape) != 2 or spec.name.endswith("kv_b_proj.weight"):
        return 2 * math.prod(shape)
    return matrix_bytes(formats[spec.kind], *shape)
