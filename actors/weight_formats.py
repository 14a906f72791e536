"""The formats of a checkpoint's weights, expert by expert and linear by linear.

Two witnesses must agree: the tensors (names, dtypes, shapes), and config.json's quantization_config. Checkpoints whose
metadata says one thing and whose tensors another are refused: reading one as the other gives fluent nonsense, not an
error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .expert_format import ACTIVATIONS, EXPERT_TENSOR, expert_matrices, matrix_format
from .quantization_config import MIXED, StatedFormats, read_quantization
from .safetensors_header import CheckpointError, TensorEntry, dtype_name

INT8_LINEAR = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)"
    r"|mlp\.(shared_experts\.)?(gate|up|down)_proj)"
)
"""The linears that may be in INT8, without the prefix. kv_b_proj may not: it is split and transposed when loaded, so
that its rows' scales would become columns' scales."""
INT8_LINEARS = "attention projections but kv_b_proj, shared experts and dense MLPs"

_LINEAR = re.compile(rf"{INT8_LINEAR.pattern}|model\.layers\.\d+\.self_attn\.kv_b_proj|lm_head")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # which of them a tensor may have is checked by its spec


@dataclass(frozen=True)
class WeightFormats:
    """experts: the routed experts' format, one of `kernels.formats.FORMATS`, or "mixed"; then by_expert[layer, expert]
    has each. int8_linears: modules in INT8, names without the prefix; other linears are bf16 or float32."""

    experts: str
    by_expert: Mapping[tuple[int, int], str] = field(default_factory=dict)
    int8_linears: frozenset[str] = frozenset()

    def matrix(self, layer: int, expert: int) -> str:
        """The format of an expert's three matrices. Raises CheckpointError for an expert that is not there."""
        if self.experts != MIXED:
            return self.experts
        try:
            return self.by_expert[layer, expert]
        except KeyError:
            raise CheckpointError(f"model.layers.{layer}.mlp.experts.{expert}: no tensors of this expert") from None


def weight_formats(config: Mapping[str, Any], prefix: str, entries: Mapping[str, TensorEntry]) -> WeightFormats:
    """config: config.json. entries: by name without the prefix.

    Raises CheckpointError naming the tensor or the field that contradicts, or that flyray cannot run; the caller adds
    the folder.
    """
    stated = read_quantization(config)
    experts = _experts(stated, prefix, entries)
    formats = set(experts.values())
    if not formats:
        raise CheckpointError("no routed experts (model.layers.N.mlp.experts.E.gate_proj...)")
    linears = _int8_linears(stated, prefix, entries)
    return WeightFormats(MIXED, experts, linears) if len(formats) > 1 else WeightFormats(formats.pop(), {}, linears)


def _experts(stated: StatedFormats, prefix: str, entries: Mapping[str, TensorEntry]) -> dict[tuple[int, int], str]:
    found: dict[tuple[int, int], str] = {}
    names: dict[tuple[int, int], str] = {}
    doubtful: dict[str, tuple[str | None, str]] = {}
    first: dict[int, tuple[str, str]] = {}
    for matrix, parts in expert_matrices(entries).items():
        layer, expert = _numbers(matrix)
        said = stated.matrix(layer, expert, matrix, prefix + matrix)
        format = matrix_format(matrix, parts, said)
        if said != format:
            doubtful[matrix] = said, format
        other = names.setdefault((layer, expert), matrix)
        if found.setdefault((layer, expert), format) != format:
            raise CheckpointError(
                f"one expert's matrices are in several formats: {other} is {found[layer, expert]}, {matrix} is {format}"
            )
        one, its = first.setdefault(layer, (matrix, format))
        if ACTIVATIONS[its] != ACTIVATIONS[format]:
            raise CheckpointError(
                f"the experts of layer {layer} multiply several kinds of activations: {one} is {its}, for "
                f"{ACTIVATIONS[its].value}, {matrix} is {format}, for {ACTIVATIONS[format].value}"
            )
    for matrix, (said, format) in doubtful.items():
        what = f"says {said}" if said else "says nothing"
        raise CheckpointError(
            f"config.json's quantization_config {what}, but the experts' tensors are {format} (for example {matrix})"
        )
    for layer, expert in stated.by_expert:
        if (layer, expert) not in found:
            raise CheckpointError(f"quantization_config.experts: there is no expert {expert} in layer {layer}")
    return found


def _numbers(matrix: str) -> tuple[int, int]:
    """Layer and expert of a matrix that `expert_matrices` found."""
    match = EXPERT_TENSOR.fullmatch(f"{matrix}.weight")
    assert match is not None
    return int(match["layer"]), int(match["expert"])


def _int8_linears(stated: StatedFormats, prefix: str, entries: Mapping[str, TensorEntry]) -> frozenset[str]:
    found: set[str] = set()
    linears = _linears(entries)
    for module, parts in linears.items():
        format = _linear_format(module, parts)
        said = stated.linear(module, prefix + module)
        if said != format:
            raise CheckpointError(
                f"config.json's quantization_config says {said} of {prefix}{module}, but its tensors are {format}"
            )
        if format == "w8a8":
            found.add(module)
    for name in stated.int8_linears:
        if name.removeprefix(prefix) not in found:
            raise CheckpointError(f"quantization_config.linears names {name}, of which there is no tensor")
    for module in found:
        # Gate and up are one matrix in memory.
        if module.endswith(("gate_proj", "up_proj")):
            at, _, kind = module.rpartition(".")
            other = f"{at}.{'up_proj' if kind == 'gate_proj' else 'gate_proj'}"
            if other in linears and other not in found:
                raise CheckpointError(f"{module} is in INT8 and {other} is not; both or neither can be run")
    return frozenset(found)


def _linears(entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Linear modules that are no routed expert's -> their tensors named weight..., by last name part."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        if part.startswith("weight") and _LINEAR.fullmatch(module):
            found.setdefault(module, {})[part] = entry
    return found


def _linear_format(module: str, parts: Mapping[str, TensorEntry]) -> str:
    """ "bf16" or "w8a8"."""
    weight = parts.get("weight")
    if weight is not None and set(parts) == {"weight"} and weight.dtype in _FLOATS:
        return "bf16"
    seen = ", ".join(f"{part} {dtype_name(entry.dtype)} {list(entry.shape)}" for part, entry in parts.items())
    if not INT8_LINEAR.fullmatch(module):
        raise CheckpointError(
            f"{module} has the tensors {seen}: it must be bfloat16 or float32; only {INT8_LINEARS} may be INT8"
        )
    if weight is None or weight.dtype != torch.int8 or set(parts) - {"weight", "weight_scale", "weight_zero_point"}:
        raise CheckpointError(
            f"{module} has the tensors {seen}: a linear is bfloat16, float32, or INT8 (weight int8 [N, K] and "
            "weight_scale float32 [N])"
        )
    if "weight_scale" not in parts:
        raise CheckpointError(f"tensor {module}.weight_scale is missing; a linear in INT8 has it")
    return "w8a8"
