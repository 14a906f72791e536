"""What config.json says of a checkpoint in one of AMD Quark's layouts, as data: whoever rounded the weights, Quark or
flyray, writes the same words, so that Quark's own loaders and vLLM's take both alike.

The keys and values are those that Quark 0.13 itself writes (a test compares them with its exports).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .matrix import QuantizeError

QUARK_VERSION = "0.13"
"""The release whose words these are; `quantization_config.version`."""

FORMATS = ("w8a8", "w8a8-fp8", "w4a8-channel")
"""The formats that have a layout of Quark's."""


def quark_config(format: str, exclude: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of a checkpoint in which every Linear is in `format` but those of `exclude`.

    exclude: stored names of the modules that stay as they were, each in full, as vLLM compares for equality; they are
    written sorted, as Quark does. A pattern ("re:...", or a glob) is refused with a QuantizeError, as is a format
    without a layout of Quark's.
    """
    if format not in FORMATS:
        raise QuantizeError(f"{format} is no layout of AMD Quark; those are {', '.join(FORMATS)}")
    names = sorted(set(exclude))
    for name in names:
        if name.startswith("re:") or any(sign in name for sign in "*?["):
            raise QuantizeError(f"exclude names {name!r}; a module's whole name is needed, no pattern")
    weight, activations = _layers(format)
    return {
        "global_quant_config": {
            "input_tensors": activations,
            "output_tensors": None,
            "weight": weight,
            "bias": None,
            "target_device": None,
        },
        "exclude": names,
        "algo_config": None,
        "softmax_quant_spec": None,
        "quant_method": "quark",
        "layer_type_quant_config": {},
        "layer_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "quant_mode": "eager_mode",
        "version": QUARK_VERSION,
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }


def _layers(format: str) -> tuple[dict[str, Any] | list[dict[str, Any]], dict[str, Any]]:
    """The laws of weights (one stage or two) and of activations."""
    match format:
        case "w8a8":
            return _per_channel("int8", 0, "float32"), _per_channel("int8", 1, "float32", dynamic=True)
        case "w8a8-fp8":
            return _per_channel("fp8_e4m3", 0, "float"), _per_channel("fp8_e4m3", 1, "float", dynamic=True)
    stages = [_per_tensor("fp8_e4m3"), _per_channel("int4", 0, "float32")]
    return stages, _per_tensor("fp8_e4m3", dynamic=True)


def _per_channel(dtype: str, axis: int, scale: str, dynamic: bool = False) -> dict[str, Any]:
    """One scale an output row of weights (axis 0), or one a token of activations (axis 1)."""
    return _law(dtype, "per_channel", axis, scale, dynamic, "PerChannelMinMaxObserver")


def _per_tensor(dtype: str, dynamic: bool = False) -> dict[str, Any]:
    return _law(dtype, "per_tensor", None, "float32", dynamic, "PerTensorMinMaxObserver")


def _law(dtype: str, scheme: str, axis: int | None, scale: str, dynamic: bool, observer: str) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "is_dynamic": dynamic,
        "qscheme": scheme,
        "ch_axis": axis,
        "group_size": None,
        "block_size": None,
        "symmetric": True,
        "round_method": "half_even",
        "scale_type": scale,
        "zero_point_type": "int32",
        "scale_format": None,
        "scale_calculation_mode": None,
        "mx_element_dtype": None,
        "observer_cls": observer,
        "is_scale_quant": False,
        "enable_buffer_reuse": False,
        "max_input_numel": 4194304,
    }
