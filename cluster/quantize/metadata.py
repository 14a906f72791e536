"""The files beside the tensors: a truthful config.json, the index, checksums, and the tokenizer's and templates'."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ...actors.checkpoint import INDEX
from ...actors.expert_format import EXPERT_TENSOR
from .flyray_config import flyray_config
from .location import Location
from .manifest import SUMS, Manifest, dump_sums
from .plan import QuantizePlan
from .quark_config import FORMATS as QUARK_FORMATS
from .quark_config import quark_config
from .resume import CONFIG

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
_OWN = (CONFIG, INDEX, SUMS, "quantize.json")


def write_metadata(plan: QuantizePlan, progress: Manifest) -> None:
    """Copies the source's other files, then writes the index, the checksums and, last of all, config.json: a folder
    without it does not open as a checkpoint, so an interrupted run is never taken for a whole one."""
    folder = plan.folder
    sums = {name: record.sha256 for name, record in progress.files.items()}
    contents = {file.name: file.read_bytes() for file in copied_files(plan.source.path)}
    contents[INDEX] = _index(plan)
    config = _config(plan)
    for name, content in contents.items():
        folder.write(name, content)
    sums |= {name: hashlib.sha256(content).hexdigest() for name, content in (*contents.items(), (CONFIG, config))}
    folder.write(SUMS, dump_sums(sums))
    folder.write(CONFIG, config)


def copied_files(source: Location) -> list[Location]:
    """Tokenizer, generation config, chat template, licence...: every plain file that holds no weights."""
    return [
        file
        for file in sorted(source.iterdir(), key=lambda file: file.name)
        if file.is_file()
        and file.suffix not in _WEIGHT_FILES
        and not file.name.startswith(".")
        and file.name not in _OWN
    ]


def quantization_config(plan: QuantizePlan) -> dict[str, Any]:
    """Quark's words where the result is one of its layouts, else flyray's."""
    experts = expert_formats(plan)
    formats = set(experts.values())
    linears = [f"{plan.source.prefix}{matrix.name}" for matrix in plan.matrices if not _is_expert(matrix.name)]
    if len(formats) == 1 and formats <= set(QUARK_FORMATS) and (not linears or formats == {"w8a8"}):
        return quark_config(formats.pop(), plan.unquantized)
    return flyray_config(experts, linears, plan.unquantized)


def expert_formats(plan: QuantizePlan) -> dict[tuple[int, int], str]:
    """(layer, expert) -> format of every routed expert, quantized or not."""
    found: dict[tuple[int, int], str] = {}
    for name in plan.source.names:
        if (match := EXPERT_TENSOR.fullmatch(name)) is not None:
            found[int(match["layer"]), int(match["expert"])] = plan.source_format
    for matrix in plan.matrices:
        if (match := EXPERT_TENSOR.fullmatch(f"{matrix.name}.weight")) is not None:
            found[int(match["layer"]), int(match["expert"])] = matrix.scheme.format
    return found


def _is_expert(module: str) -> bool:
    return EXPERT_TENSOR.fullmatch(f"{module}.weight") is not None


def _index(plan: QuantizePlan) -> bytes:
    weight_map = {name: file.name for file in plan.files for name in file.specs}
    return _json({"metadata": {"total_size": plan.target_bytes}, "weight_map": weight_map})


def _config(plan: QuantizePlan) -> bytes:
    config = _without_quantization(copy.deepcopy(dict(plan.source.config)))
    config["quantization_config"] = quantization_config(plan)
    return _json(config)


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Drops what the source says of its own quantization, at the top and in text_config, as Quark does."""
    config.pop("quantization_config", None)
    for value in config.values():
        if isinstance(value, dict):
            _without_quantization(value)
    return config


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
