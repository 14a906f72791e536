"""What vLLM's Quark loader asks of a checkpoint's config.json and tensors, as far as files can tell.

Written down from reading vLLM (vllm-project/vllm at 006bce4, 2026: model_executor/layers/quantization/quark/quark.py,
quark_moe.py, utils.py; its pull requests #36320 for INT8 experts and #41892 for scales of one dimension):

- `export.kv_cache_group` and `export.pack_method` must be there;
- a module is left unquantized if `exclude` names it, in full or as a regular expression after "re:" that matches from
  its beginning; a glob matches nothing. Its names are those of the modules, with the prefix "language_model.";
- modules that vLLM fuses (gate and up; q_a and kv_a) must all be excluded, or none;
- other modules have the law of the first pattern of `layer_quant_config` that matches, else `global_quant_config`;
- routed experts take FP8 weights in a scale a row with FP8 activations a token, FP8-then-INT4 weights with FP8
  activations, and symmetric INT8 weights with dynamic INT8 activations a token; INT8 linears take the last only here;
- scales are float32, one a row; the first scale of FP8-then-INT4 weights is one number, and not 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FUSED = (("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))


def check_layout(path: Path) -> None:
    """Raises AssertionError, naming the module, if vLLM would not load the checkpoint as it is meant."""
    stated = json.loads((path / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "quark"
    assert stated["export"]["kv_cache_group"] == []
    assert stated["export"]["pack_method"] == "reorder"
    modules: dict[str, dict[str, Tensor]] = {}
    for file in path.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = tensor
    linears = {name: parts for name, parts in modules.items() if is_linear(name, parts)}
    assert any(".experts." in name for name in linears)
    for module, parts in linears.items():
        if is_excluded(module, stated["exclude"]):
            assert ".experts." not in module, f"{module}: routed experts cannot be excluded one by one"
            assert parts.keys() == {"weight"} or parts.keys() == {"weight", "e_score_correction_bias"}, module
            assert parts["weight"].is_floating_point(), module
        else:
            check_tensors(module, parts, law_of(module, stated))
        for one, other in FUSED:
            twin = module.removesuffix(one) + other
            if module.endswith(f".{one}") and twin in linears:
                assert is_excluded(module, stated["exclude"]) == is_excluded(twin, stated["exclude"]), module


def is_linear(module: str, parts: Mapping[str, Tensor]) -> bool:
    return "weight" in parts and parts["weight"].dim() == 2 and "embed" not in module


def is_excluded(module: str, exclude: list[str]) -> bool:
    return any(re.match(each[3:], module) if each.startswith("re:") else each == module for each in exclude)


def law_of(module: str, stated: Mapping[str, Any]) -> str:
    """The kind of quantization that vLLM takes the module's for."""
    layers = stated["layer_quant_config"]
    law = next((layers[each] for each in layers if fnmatch(module, each)), stated["global_quant_config"])
    assert not law.get("output_tensors"), module
    assert not law.get("bias"), module
    weight, inputs = law["weight"], law["input_tensors"]
    if isinstance(weight, list):
        first, second = weight
        assert [first["dtype"], first["qscheme"], second["dtype"], second["qscheme"]] == [
            "fp8_e4m3",
            "per_tensor",
            "int4",
            "per_channel",
        ]
        assert second["symmetric"] is True
        assert second["ch_axis"] == 0
        assert not first["is_dynamic"]
        assert not second["is_dynamic"]
        assert inputs["dtype"] == "fp8_e4m3"
        assert inputs["is_dynamic"]
        return "fp8 then int4"
    assert (weight["qscheme"], inputs["qscheme"]) == ("per_channel", "per_channel"), module
    assert not weight["is_dynamic"]
    assert inputs["is_dynamic"] is True
    if weight["dtype"] == "int8":
        assert weight["symmetric"] is True
    assert weight["dtype"] == inputs["dtype"]
    return {"int8": "int8", "fp8_e4m3": "fp8"}[weight["dtype"]]


def check_tensors(module: str, parts: Mapping[str, Tensor], law: str) -> None:
    """Names, dtypes and shapes of one quantized module."""
    weight, rows = parts["weight"], parts["weight"].shape[0]
    expected = {
        "int8": {"weight": torch.int8, "weight_scale": torch.float32},
        "fp8": {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32},
        "fp8 then int4": {"weight": torch.int32, "weight_scale": torch.float32, "weight_scale_2": torch.float32},
    }[law]
    assert {part: tensor.dtype for part, tensor in parts.items()} == expected, module
    assert weight.dim() == 2, module
    if law == "fp8 then int4":
        assert ".experts." in module, f"{module}: only routed experts can be FP8 then INT4"
        assert parts["weight_scale"].numel() == 1, module
        assert float(parts["weight_scale"]) != 0, module
        assert parts["weight_scale_2"].shape == (rows,), module
    else:
        assert parts["weight_scale"].shape == (rows,), module
