"""A tiny checkpoint of the published layout: two layers, the second with four routed experts, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flyray.kernels import formats

HIDDEN, INTERMEDIATE, EXPERTS = 128, 64, 4
PREFIX = "language_model."
OTHER_FILES = {
    "generation_config.json": '{"eos_token_id": 3}',
    "tokenizer_config.json": '{"tokenizer_class": "T"}',
    "tiktoken.model": "IQ== 0\n",
    "chat_template.jinja": "{{ messages }}",
}
NATIVE_QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
                "actorder": None,
            },
        }
    },
}

Tensors = dict[str, torch.Tensor]


def expert_matrices(hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> dict[str, tuple[int, int]]:
    """Name -> (rows, columns) of every routed expert's matrix, without the prefix."""
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    return {
        f"model.layers.1.mlp.experts.{expert}.{kind}_proj": shape
        for expert in range(EXPERTS)
        for kind, shape in shapes.items()
    }


def native_tensors(hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, seed: int = 0) -> Tensors:
    """Every tensor of the native checkpoint, with the prefix; experts in INT4 groups of 32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = _dense_tensors(generator)
    for matrix, (rows, columns) in expert_matrices(hidden, intermediate).items():
        padded = -(-columns // 32) * 32
        weight = torch.randn(rows, padded, generator=generator) * 0.05
        values, scale = formats.quantize_native(weight)
        words = formats.pack_native(values[:, : -(-columns // 8) * 8].contiguous())
        tensors[f"{PREFIX}{matrix}.weight_packed"] = words
        tensors[f"{PREFIX}{matrix}.weight_scale"] = scale
        tensors[f"{PREFIX}{matrix}.weight_shape"] = torch.tensor([rows, columns], dtype=torch.int32)
    return tensors


def bf16_tensors(hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, seed: int = 0) -> Tensors:
    """Every tensor of an unquantized checkpoint, with the prefix."""
    generator = torch.Generator().manual_seed(seed)
    tensors = _dense_tensors(generator)
    for matrix, (rows, columns) in expert_matrices(hidden, intermediate).items():
        weight = torch.randn(rows, columns, generator=generator) * 0.05
        tensors[f"{PREFIX}{matrix}.weight"] = weight.to(torch.bfloat16)
    return tensors


def write_checkpoint(folder: Path, files: dict[str, Tensors], quantization: dict[str, Any] | None) -> Path:
    """The folder, with index, config.json (nested as published) and tokenizer files."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    text: dict[str, Any] = {"model_type": "kimi_k2", "hidden_size": HIDDEN, "torch_dtype": "bfloat16"}
    if quantization is not None:
        text["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))
    for name, content in OTHER_FILES.items():
        (folder / name).write_text(content)
    return folder


def native_checkpoint(folder: Path, **sizes: int) -> Path:
    """Two files; every matrix with its scales."""
    tensors = native_tensors(**sizes)
    first = {name: tensor for name, tensor in tensors.items() if ".experts.3." not in name}
    second = {name: tensor for name, tensor in tensors.items() if name not in first}
    files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    return write_checkpoint(folder, files, NATIVE_QUANTIZATION)


def scattered_checkpoint(folder: Path) -> Path:
    """The same tensors, every scale in another file than its nibbles."""
    tensors = native_tensors()
    scales = {name: tensor for name, tensor in tensors.items() if ".experts." in name and "_scale" in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in scales}
    return write_checkpoint(folder, {"a.safetensors": rest, "b.safetensors": scales}, NATIVE_QUANTIZATION)


def bf16_checkpoint(folder: Path) -> Path:
    return write_checkpoint(folder, {"model.safetensors": bf16_tensors()}, None)


def _dense_tensors(generator: torch.Generator) -> Tensors:
    def bf16(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).to(torch.bfloat16)

    layers: Tensors = {
        "lm_head.weight": bf16(256, HIDDEN),
        "model.embed_tokens.weight": bf16(256, HIDDEN),
        "model.norm.weight": bf16(HIDDEN),
        "model.layers.0.mlp.gate_proj.weight": bf16(96, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": bf16(96, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": bf16(HIDDEN, 96),
        "model.layers.1.mlp.gate.weight": bf16(EXPERTS, HIDDEN),
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.randn(EXPERTS, generator=generator),
        "model.layers.1.mlp.shared_experts.gate_proj.weight": bf16(INTERMEDIATE, HIDDEN),
        "model.layers.1.mlp.shared_experts.up_proj.weight": bf16(INTERMEDIATE, HIDDEN),
        "model.layers.1.mlp.shared_experts.down_proj.weight": bf16(HIDDEN, INTERMEDIATE),
    }
    for layer in (0, 1):
        layers[f"model.layers.{layer}.input_layernorm.weight"] = bf16(HIDDEN)
        layers[f"model.layers.{layer}.self_attn.o_proj.weight"] = bf16(HIDDEN, HIDDEN)
    tensors = {PREFIX + name: tensor for name, tensor in layers.items()}
    tensors["vision_tower.patch_embed.proj.weight"] = bf16(8, 3, 2, 2)
    tensors["vision_tower.blocks.0.wqkv.weight"] = bf16(24, 8)
    return tensors
