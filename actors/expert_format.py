"""Which of `kernels.formats.FORMATS` the routed experts of a checkpoint are in.

Two witnesses must agree: the tensors of every expert matrix (names, dtypes, shapes), and config.json's
quantization_config. Checkpoints whose metadata says one thing and whose tensors another are refused: reading one as
the other gives fluent nonsense, not an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..kernels.formats import FORMATS, GROUP_SIZE
from .safetensors_header import CheckpointError, TensorEntry, dtype_name

EXPERT_TENSOR = re.compile(
    r"(?P<matrix>model\.layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<expert>\d+)\.(?P<kind>gate|up|down)_proj)"
    r"\.(?P<part>\w+)"
)
"""A routed expert's tensor, without the checkpoint's prefix."""

_PARTS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "w4a16": {"weight_packed": (torch.int32,), "weight_scale": (torch.bfloat16,), "weight_shape": (torch.int32,)},
    "w4a8": {"weight_packed": (torch.int32,), "weight_multiplier": (torch.uint8,), "weight_scale": (torch.float32,)},
    "w8a8": {"weight": (torch.int8,), "weight_scale": (torch.float32,)},
    "w8a8-fp8": {"weight": (torch.float8_e4m3fn,), "weight_scale": (torch.float32, torch.bfloat16)},
    "w4a8-channel": {
        "weight": (torch.int32,),
        "weight_scale": (torch.float32,),
        "weight_scale_2": (torch.float32,),
    },
    "bf16": {"weight": (torch.bfloat16,)},
}
_OPTIONAL = {"w4a16": {"weight_shape"}, "w4a8": {"weight_shape"}, "w8a8": {"weight_zero_point"}}


def expert_format(path: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> str:
    """The format, or a CheckpointError naming the tensor or the field that contradicts.

    entries: by name without prefix. config: config.json, the quantization_config at its top or in text_config.
    """
    matrices = expert_matrices(entries)
    if not matrices:
        raise CheckpointError(f"{path}: no routed experts (model.layers.N.mlp.experts.E.gate_proj...)")
    formats: dict[str, str] = {}
    for matrix, parts in matrices.items():
        formats.setdefault(_format_of(path, matrix, parts), matrix)
    if len(formats) > 1:
        (one, first), (other, second) = list(formats.items())[:2]
        raise CheckpointError(f"{path}: experts are in several formats: {first} is {one}, {second} is {other}")
    (found,) = formats
    stated = config_format(path, config)
    if stated != found:
        raise CheckpointError(
            f"{path}: config.json's quantization_config says {stated}, but the experts' tensors are {found} "
            f"(for example {formats[found]})"
        )
    return found


def expert_matrices(entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Expert matrix name -> its tensors by their last name part ("weight_packed"), in the order found."""
    matrices: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        if match := EXPERT_TENSOR.fullmatch(name):
            matrices.setdefault(match["matrix"], {})[match["part"]] = entry
    return matrices


def config_format(path: Path, config: Mapping[str, Any]) -> str:
    """The format that config.json states; CheckpointError for one that flyray does not know."""
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    stated = config.get("quantization_config") or nested
    if not stated:
        return "bf16"
    method = stated.get("quant_method") if isinstance(stated, Mapping) else None
    match method:
        case "compressed-tensors":
            return _compressed_tensors_format(path, stated)
        case "quark":
            return _quark_format(path, stated)
        case "flyray":
            if stated.get("format") in FORMATS:
                return stated["format"]
            raise CheckpointError(
                f"{path}: quantization_config.format is {stated.get('format')!r}, not one of {FORMATS}"
            )
    raise CheckpointError(
        f"{path}: quantization_config.quant_method is {method!r}; known are compressed-tensors, quark and flyray"
    )


def _compressed_tensors_format(path: Path, stated: Mapping[str, Any]) -> str:
    try:
        weights = stated["config_groups"]["group_0"]["weights"]
        seen = {key: weights[key] for key in ("num_bits", "type", "strategy", "group_size", "symmetric")}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: quantization_config.config_groups.group_0.weights lacks {error}") from None
    seen |= {"format": stated.get("format"), "actorder": weights.get("actorder")}
    expected = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": GROUP_SIZE,
        "symmetric": True,
        "format": "pack-quantized",
        "actorder": None,
    }
    for key, value in expected.items():
        if seen[key] != value:
            raise CheckpointError(f"{path}: quantization_config: {key} is {seen[key]!r}; only {value!r} can be read")
    return "w4a16"


def _quark_format(path: Path, stated: Mapping[str, Any]) -> str:
    layers = stated.get("global_quant_config") or {}
    weight = layers.get("weight") if isinstance(layers, Mapping) else None
    stages = weight if isinstance(weight, list) else [weight]
    law = [(stage.get("dtype"), stage.get("qscheme")) for stage in stages if isinstance(stage, Mapping)]
    known = {
        (("fp8_e4m3", "per_channel"),): "w8a8-fp8",
        (("int8", "per_channel"),): "w8a8",
        (("fp8_e4m3", "per_tensor"), ("int4", "per_channel")): "w4a8-channel",
    }
    found = known.get(tuple(law))
    if found is None:
        raise CheckpointError(
            f"{path}: quantization_config.global_quant_config.weight is {law}; known are {[list(k) for k in known]}"
        )
    pack = (stated.get("export") or {}).get("pack_method", "reorder")
    if found == "w4a8-channel" and pack != "reorder":
        raise CheckpointError(f"{path}: quantization_config.export.pack_method is {pack!r}; only 'reorder' can be read")
    return found


def _format_of(path: Path, matrix: str, parts: Mapping[str, TensorEntry]) -> str:
    for name, required in _PARTS.items():
        optional = _OPTIONAL.get(name, set())
        if set(parts) - optional != set(required) - optional:
            continue
        if all(parts[part].dtype in dtypes for part, dtypes in required.items() if part in parts):
            _check_shapes(name, matrix, parts)
            return name
    seen = ", ".join(f"{part} {dtype_name(entry.dtype)} {list(entry.shape)}" for part, entry in parts.items())
    raise CheckpointError(f"{path}: {matrix} has the tensors {seen}: no known format has these names and dtypes")


def _check_shapes(name: str, matrix: str, parts: Mapping[str, TensorEntry]) -> None:
    weight = parts.get("weight") or parts["weight_packed"]
    if len(weight.shape) != 2:
        raise CheckpointError(f"{weight.file}: weight of {matrix} has shape {list(weight.shape)}, expected [N, K]")
    rows, words = weight.shape
    # Two multipliers share a byte, so w4a8 needs an even number of groups.
    multiple = {"w4a16": GROUP_SIZE, "w4a8": 2 * GROUP_SIZE}.get(name, 1)
    if words * 8 % multiple:
        raise CheckpointError(f"{weight.file}: {matrix} has {words * 8} columns; {name} needs a multiple of {multiple}")
    expected: dict[str, tuple[tuple[int, ...], ...]] = {
        "w4a16": {"weight_scale": ((rows, words * 8 // GROUP_SIZE),), "weight_shape": ((2,),)},
        "w4a8": {
            "weight_multiplier": ((rows, words * 8 // GROUP_SIZE // 2),),
            "weight_scale": ((rows,),),
            "weight_shape": ((2,),),
        },
        "w8a8": {"weight_scale": ((rows,),), "weight_zero_point": ((rows,),)},
        "w8a8-fp8": {"weight_scale": ((rows,),)},
        "w4a8-channel": {"weight_scale": ((), (1,)), "weight_scale_2": ((rows,),)},
        "bf16": {},
    }[name]
    for part, shapes in expected.items():
        if part in parts and parts[part].shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(
                f"{parts[part].file}: {matrix}.{part} has shape {list(parts[part].shape)}, expected {wanted}"
            )
