"""The files beside the tensors: a truthful config.json, the index, and the tokenizer's and templates' files."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ...actors.checkpoint import INDEX
from ...kernels.formats import GROUP_SIZE, MAX_MULTIPLIER
from .plan import QuantizePlan
from .quark_quantizer import SCHEMES
from .safetensors_writer import temporary_path

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")


def write_metadata(plan: QuantizePlan, quark_config: dict[str, Any] | None) -> None:
    """Copies the source's other files, then writes the index and, last of all, config.json: a folder without it does
    not open as a checkpoint, so an interrupted run is never taken for a whole one."""
    for file in copied_files(plan.source):
        temporary = temporary_path(plan.target / file.name)
        shutil.copyfile(file, temporary)
        os.replace(temporary, plan.target / file.name)
    weight_map = {name: file.target.name for file in plan.files for name in file.specs}
    _write_json(plan.target / INDEX, {"metadata": {"total_size": plan.target_bytes}, "weight_map": weight_map})
    config = _without_quantization(copy.deepcopy(dict(plan.config)))
    config["quantization_config"] = quantization_config(plan, quark_config)
    _write_json(plan.target / "config.json", config)


def copied_files(source: Path) -> list[Path]:
    """Tokenizer, generation config, chat template, licence...: every plain file that holds no weights."""
    return [
        file
        for file in sorted(source.iterdir())
        if file.is_file()
        and file.suffix not in _WEIGHT_FILES
        and not file.name.startswith(".")
        and file.name not in ("config.json", INDEX)
    ]


def quantization_config(plan: QuantizePlan, quark_config: dict[str, Any] | None) -> dict[str, Any]:
    """Quark's own where Quark ran, with the whole checkpoint's unquantized modules; flyray's for `w4a8`."""
    if plan.format in SCHEMES:
        if quark_config is None:
            raise ValueError(f"{plan.format} was written without Quark")
        return {**quark_config, "exclude": list(plan.unquantized)}
    return {
        "quant_method": "flyray",
        "format": plan.format,
        "version": 1,
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "group_size": GROUP_SIZE,
            "packing": "weight_packed: 8 values an int32, least significant nibble first, offset binary (value + 8)",
            "multiplier": f"weight_multiplier: 1..{MAX_MULTIPLIER} a group, two a byte, the even group low",
            "scale": "weight_scale: float32 a row; weight = value * multiplier * scale",
        },
        "input_activations": {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "dynamic": True,
            "strategy": "token",
        },
        "exclude": list(plan.unquantized),
    }


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Drops what the source says of its own quantization, at the top and in text_config, as Quark does."""
    config.pop("quantization_config", None)
    for value in config.values():
        if isinstance(value, dict):
            _without_quantization(value)
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = temporary_path(path)
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
