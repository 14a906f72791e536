"""Checkpoints whose experts are in several formats, and whose linears are in INT8, made from one model's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_oracle import WRITERS, Tensors, published_tensors, random_model, save_checkpoint, small_text, write_bf16

from flyray.actors.expert_format import EXPERT_TENSOR
from flyray.actors.quantization_config import format_experts
from flyray.actors.weight_formats import INT8_LINEAR
from flyray.kernels.formats import quantize_int8_rows

FormatOf = Callable[[int, int], str]
"""(layer, expert) -> format."""
# A model of the engine tests' vocabulary and context.
TEXT = small_text(vocab_size=256, max_position_embeddings=512)


def cycle(*formats: str) -> FormatOf:
    """Formats in turn, expert by expert, starting elsewhere in each layer."""
    return lambda layer, expert: formats[(layer + expert) % len(formats)]


def dense_tensors(seed: int, text: dict[str, Any] = TEXT) -> Tensors:
    """A random model's tensors under their published names, all of them values that bfloat16 holds."""
    return published_tensors(random_model(text, seed), write_bf16)


def int8_linears(dense: Tensors) -> list[str]:
    """All linears that may be in INT8."""
    modules = (name.removesuffix(".weight") for name in dense)
    return [module for module in modules if INT8_LINEAR.fullmatch(module)]


def mixed_tensors(dense: Tensors, format_of: FormatOf, int8: list[str]) -> Tensors:
    """The same weights with every routed expert in its format, and the named linears in INT8."""
    tensors: Tensors = {}
    for name, tensor in dense.items():
        module = name.removesuffix(".weight")
        if match := EXPERT_TENSOR.fullmatch(name):
            parts = WRITERS[format_of(int(match["layer"]), int(match["expert"]))](tensor.float())
        elif module in int8:
            values, scale = quantize_int8_rows(tensor.float())
            parts = {"weight": values, "weight_scale": scale}
        else:
            tensors[name] = tensor
            continue
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    return tensors


def mixed_quantization(dense: Tensors, format_of: FormatOf, int8: list[str], prefix: str = "") -> dict[str, Any]:
    """What config.json says of `mixed_tensors`."""
    by_layer: dict[str, dict[str, set[int]]] = {}
    for name in dense:
        if match := EXPERT_TENSOR.fullmatch(name):
            layer, expert = int(match["layer"]), int(match["expert"])
            by_layer.setdefault(str(layer), {}).setdefault(format_of(layer, expert), set()).add(expert)
    formats = {format for layer in by_layer.values() for format in layer}
    stated: dict[str, Any] = {"quant_method": "flyray", "version": 2, "linears": {"w8a8": [prefix + n for n in int8]}}
    if len(formats) == 1:
        return stated | {"format": formats.pop()}
    experts = {
        layer: {format: format_experts(sorted(members)) for format, members in found.items()}
        for layer, found in by_layer.items()
    }
    return stated | {"format": "mixed", "experts": experts}


def write_mixed(
    path: Path,
    dense: Tensors,
    format_of: FormatOf,
    int8: list[str] | None = None,
    prefix: str = "",
    text: dict[str, Any] = TEXT,
) -> Path:
    """Writes the folder; int8: None for no linear in INT8."""
    named = int8 or []
    tensors = mixed_tensors(dense, format_of, named)
    return save_checkpoint(path, text, tensors, mixed_quantization(dense, format_of, named, prefix), prefix)
