"""A native checkpoint as peers read it: bfloat16 throughout, published names, DeepSeek-V3's configuration."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...actors.checkpoint import INDEX, Checkpoint
from ...actors.model.config import ModelConfig
from ...actors.model.tensors import attention_tensors, expert_shapes, mlp_tensors, outer_tensors
from ...kernels.formats import dequantize_native
from ..quantize.matrix import TensorSpec
from ..quantize.plan import check_space
from ..quantize.safetensors_writer import SafetensorsWriter
from ..scratch_folder import scratch_folder
from .rounds import BenchUsageError

_SCRATCH = "bench-peer-"
_FILE = "model-00001-of-000001.safetensors"


def published_folder(source: Path, work_dir: Path) -> Path:
    """The folder in work_dir, made once from a source as it is. Raises BenchUsageError for a source that is neither
    w4a16 nor bf16."""
    kept = work_dir / f"{source.name}-{_state(source)}-bf16"
    if kept.exists():
        return kept
    checkpoint = Checkpoint(source)
    if checkpoint.expert_format() not in ("w4a16", "bf16"):
        raise BenchUsageError(f"{source} is in {checkpoint.expert_format()}; peers get weights made of w4a16 or bf16")
    with scratch_folder(kept.parent, _SCRATCH) as scratch:
        made = scratch / "model"
        made.mkdir()
        _write(checkpoint, made)
        try:
            os.rename(made, kept)
        except OSError:
            if not kept.exists():
                raise
    return kept


def published_config(content: dict[str, Any]) -> dict[str, Any]:
    """config.json of the text model alone, for whoever knows DeepSeek-V3 and not Kimi-K2.5."""
    text = dict(content.get("text_config", content))
    text.pop("quantization_config", None)
    return text | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16"}


def _state(source: Path) -> str:
    """Changes when the files of the checkpoint do."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.iterdir())
    return hashlib.sha256(json.dumps([str(source.resolve()), files]).encode()).hexdigest()[:12]


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    config = ModelConfig.from_dict(checkpoint.config)
    specs = dict(_specs(config))
    total = sum(spec.bytes for spec in specs.values())
    check_space(folder, total)
    with SafetensorsWriter(folder / _FILE, specs) as writer:
        for name in specs:
            writer.write(name, _tensor(checkpoint, name))
        writer.commit()
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(specs, _FILE)}
    (folder / INDEX).write_text(json.dumps(index) + "\n")
    (folder / "config.json").write_text(json.dumps(published_config(checkpoint.config), indent=2) + "\n")


def _specs(config: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    plain = list(outer_tensors(config))
    for layer in range(config.num_hidden_layers):
        plain += [*attention_tensors(config, layer), *mlp_tensors(config, layer)]
    for spec in plain:
        yield spec.name, TensorSpec(spec.dtypes[0], spec.shapes[0])
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            for matrix, shape in expert_shapes(config).items():
                name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                yield name, TensorSpec(torch.bfloat16, shape)


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    if checkpoint.has(name):
        return checkpoint.read(name).to(torch.bfloat16)
    at = name.removesuffix(".weight")
    packed, scale = checkpoint.read(f"{at}.weight_packed"), checkpoint.read(f"{at}.weight_scale")
    return dequantize_native(packed, scale, dtype=torch.bfloat16)
