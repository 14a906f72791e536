"""What config.json says of a checkpoint that no other project has words for: flyray's own quantization_config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...actors.quantization_config import format_experts
from ...kernels.formats import GROUP_SIZE, MAX_MULTIPLIER

_WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "group_size": GROUP_SIZE,
    "packing": "weight_packed: 8 values an int32, least significant nibble first, offset binary (value + 8)",
    "multiplier": f"weight_multiplier: 1..{MAX_MULTIPLIER} a group, two a byte, the even group low",
    "scale": "weight_scale: float32 a row; weight = value * multiplier * scale",
}
_INPUT_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def flyray_config(
    experts: Mapping[tuple[int, int], str], linears: Sequence[str], exclude: Sequence[str]
) -> dict[str, Any]:
    """experts: format of every routed expert by (layer, expert). linears: stored names of the modules in w8a8.
    exclude: stored names of the Linear modules that stay as they were.

    Version 1 where all experts are w4a8 and nothing else is quantized, else version 2."""
    formats = set(experts.values())
    format = formats.pop() if len(formats) == 1 else "mixed"
    words = {"weights": dict(_WEIGHTS), "input_activations": dict(_INPUT_ACTIVATIONS)}
    if format == "w4a8" and not linears:
        return {"quant_method": "flyray", "format": format, "version": 1, **words, "exclude": list(exclude)}
    config: dict[str, Any] = {"quant_method": "flyray", "format": format, "version": 2}
    if format == "mixed":
        config["experts"] = _by_layer(experts)
    if format == "w4a8":
        config |= words
    if linears:
        config["linears"] = {"w8a8": sorted(linears)}
    return config | {"exclude": list(exclude)}


def _by_layer(experts: Mapping[tuple[int, int], str]) -> dict[str, dict[str, str]]:
    """{"3": {"w8a8": "0-5,12", ...}, ...}"""
    numbers: dict[int, dict[str, list[int]]] = {}
    for (layer, expert), format in sorted(experts.items()):
        numbers.setdefault(layer, {}).setdefault(format, []).append(expert)
    return {
        str(layer): {format: format_experts(found) for format, found in sorted(formats.items())}
        for layer, formats in numbers.items()
    }
