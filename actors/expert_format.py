"""Which of `kernels.formats.FORMATS` a routed expert's matrix is in, by its tensors' names, dtypes and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ..kernels.formats import GROUP_SIZE
from ..kernels.protocol import ActivationFormat
from .safetensors_header import CheckpointError, TensorEntry, dtype_name

EXPERT_TENSOR = re.compile(
    r"(?P<matrix>model\.layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<expert>\d+)\.(?P<kind>gate|up|down)_proj)"
    r"\.(?P<part>\w+)"
)
"""A routed expert's tensor, without the checkpoint's prefix."""

ACTIVATIONS = {
    "bf16": ActivationFormat.FLOAT,
    "w4a16": ActivationFormat.FLOAT,
    "w4a8": ActivationFormat.INT8,
    "w8a8": ActivationFormat.INT8,
    "w4a8-channel": ActivationFormat.INT8,
    "w8a8-fp8": ActivationFormat.FP8,
}
"""What experts multiply in each format."""

# compressed-tensors has written weight_shape in either width.
_SHAPE_DTYPES = (torch.int32, torch.int64)
_PARTS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "w4a16": {"weight_packed": (torch.int32,), "weight_scale": (torch.bfloat16,), "weight_shape": _SHAPE_DTYPES},
    "w4a8": {
        "weight_packed": (torch.int32,),
        "weight_multiplier": (torch.uint8,),
        "weight_scale": (torch.float32,),
        "weight_shape": _SHAPE_DTYPES,
    },
    "w8a8": {"weight": (torch.int8,), "weight_scale": (torch.float32,), "weight_zero_point": (torch.int8,)},
    "w8a8-fp8": {"weight": (torch.float8_e4m3fn,), "weight_scale": (torch.float32, torch.bfloat16)},
    "w4a8-channel": {
        "weight": (torch.int32,),
        "weight_scale": (torch.float32,),
        "weight_scale_2": (torch.float32,),
    },
    "bf16": {"weight": (torch.bfloat16,)},
}
_OPTIONAL = {"w4a16": {"weight_shape"}, "w4a8": {"weight_shape"}, "w8a8": {"weight_zero_point"}}


def expert_matrices(entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Expert matrix name -> its tensors by their last name part ("weight_packed"), in the order found."""
    matrices: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        if match := EXPERT_TENSOR.fullmatch(name):
            matrices.setdefault(match["matrix"], {})[match["part"]] = entry
    return matrices


def matrix_format(matrix: str, parts: Mapping[str, TensorEntry], stated: str | None) -> str:
    """The format that a matrix's tensors are in. Raises CheckpointError, naming matrix and tensors, if it is none.

    stated: what config.json says, to name the tensor that is missing.
    """
    for format, known in _PARTS.items():
        if not _missing(format, parts) and _fits(parts, known):
            _check_shapes(format, matrix, parts)
            return format
    if stated and _missing(stated, parts) and _fits(parts, _PARTS[stated]):
        part = _missing(stated, parts)[0]
        raise CheckpointError(f"tensor {matrix}.{part} is missing; an expert in {stated} has it")
    seen = ", ".join(f"{part} {dtype_name(entry.dtype)} {list(entry.shape)}" for part, entry in parts.items())
    raise CheckpointError(f"{matrix} has the tensors {seen}: no known format has these names and dtypes")


def _missing(format: str, parts: Mapping[str, TensorEntry]) -> list[str]:
    return [part for part in _PARTS[format] if part not in parts and part not in _OPTIONAL.get(format, ())]


def _fits(parts: Mapping[str, TensorEntry], known: Mapping[str, tuple[torch.dtype, ...]]) -> bool:
    return all(entry.dtype in known.get(part, ()) for part, entry in parts.items())


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
