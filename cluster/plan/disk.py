"""What a checkpoint takes on the disk, tensor by tensor: of its files' headers, or of what a native one must hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ...actors.checkpoint import Checkpoint
from ...actors.model.config import ModelConfig
from ...actors.model.tensors import (
    TensorSpec,
    attention_tensors,
    check_tensors,
    mlp_tensors,
    outer_tensors,
    routed_tensors,
    shard_tensors,
)

_NATIVE = "w4a16"
_WIDE_BYTES = 2  # of bfloat16


@dataclass(frozen=True)
class DiskBytes:
    """tensors, bytes: of all files, without their headers. text_tensors, text_bytes: of those that are loaded; the rest
    is a vision tower's, which flyray does not run. read: whether files were, or a native checkpoint of the
    configuration is meant."""

    tensors: int
    bytes: int
    text_tensors: int
    text_bytes: int
    read: bool


def native_bytes(content: Mapping[str, Any], model: ModelConfig) -> DiskBytes:
    """Of the native checkpoint (routed experts in INT4 groups of 32) of a config.json."""
    one = _count(routed_tensors(model, model.moe_layers.start, 0, _NATIVE)) if model.moe_layers else (0, 0)
    text = [_count(outer_tensors(model))]
    for layer in range(model.num_hidden_layers):
        text.append(_count((*attention_tensors(model, layer), *mlp_tensors(model, layer))))
    experts = len(model.moe_layers) * model.n_routed_experts
    text.append((experts * one[0], experts * one[1]))
    tensors, size = (sum(each) for each in zip(*text, strict=True))
    vision = list(vision_shapes(content["vision_config"]).values()) if content.get("vision_config") else []
    more = sum(map(prod, vision)) * _WIDE_BYTES
    return DiskBytes(tensors + len(vision), size + more, tensors, size, read=False)


def checkpoint_bytes(checkpoint: Checkpoint, model: ModelConfig) -> DiskBytes:
    """Of a checkpoint's headers. Raises CheckpointError for a tensor that is missing or not as it must be."""
    specs = list(shard_tensors(model, checkpoint.formats, range(model.n_routed_experts)))
    loaded = [spec for spec in specs if checkpoint.has(spec.name) or not spec.optional]
    size = sum(checkpoint.entry(name).bytes for name in checkpoint.names)
    return DiskBytes(len(checkpoint.names), size, len(loaded), check_tensors(checkpoint, loaded), read=True)


def vision_shapes(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """MoonViT3d and its projector, by the published names. Positions in time are computed, not stored."""
    hidden, inner, patch = (vision[f"{name}"] for name in ("vt_hidden_size", "vt_intermediate_size", "patch_size"))
    merged = hidden * prod(vision["merge_kernel_size"])
    return dict(_vision_tensors(vision, hidden, inner, patch, merged))


def _vision_tensors(
    vision: Mapping[str, Any], hidden: int, inner: int, patch: int, merged: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    def linear(name: str, rows: int, *columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (rows, *columns)
        yield f"{name}.bias", (rows,)

    at = "vision_tower.patch_embed"
    yield from linear(f"{at}.proj", hidden, 3, patch, patch)
    yield f"{at}.pos_emb.weight", (vision["init_pos_emb_height"], vision["init_pos_emb_width"], hidden)
    for block in range(vision["vt_num_hidden_layers"]):
        at = f"vision_tower.encoder.blocks.{block}"
        for norm in ("norm0", "norm1"):
            yield from linear(f"{at}.{norm}", hidden)
        yield from linear(f"{at}.wqkv", 3 * hidden, hidden)
        yield from linear(f"{at}.wo", hidden, hidden)
        yield from linear(f"{at}.mlp.fc0", inner, hidden)
        yield from linear(f"{at}.mlp.fc1", hidden, inner)
    yield from linear("vision_tower.encoder.final_layernorm", hidden)
    yield from linear("mm_projector.pre_norm", hidden)
    yield from linear("mm_projector.proj.0", merged, merged)
    yield from linear("mm_projector.proj.2", vision["text_hidden_size"], merged)


def _count(specs: Iterable[TensorSpec]) -> tuple[int, int]:
    """Tensors, and their bytes as published: the gate's bias in float32."""
    tensors = size = 0
    for spec in specs:
        tensors += 1
        size += prod(spec.shapes[0]) * (4 if spec.kind == "gate bias" else spec.dtypes[0].itemsize)
    return tensors, size
