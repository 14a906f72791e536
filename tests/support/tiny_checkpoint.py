"""A random checkpoint in the native format, small enough to start an engine on in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flyray.actors.model.config import ModelConfig
from flyray.actors.model.tensors import TensorSpec, shard_tensors
from flyray.actors.weight_formats import WeightFormats

# A text_config of the architecture without a quantization, large enough for every format's groups.
ARCHITECTURE: dict[str, Any] = {
    "model_type": "kimi_k2",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

TINY: dict[str, Any] = {
    **ARCHITECTURE,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"},
            }
        },
    },
}


def write_tiny(path: Path, without: str = "", seed: int = 0) -> Path:
    """Writes the checkpoint's folder, leaving out the tensor named `without`."""
    path.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_dict(TINY)
    generator = torch.Generator().manual_seed(seed)
    specs = shard_tensors(config, WeightFormats("w4a16"), range(config.n_routed_experts))
    tensors = {spec.name: random_tensor(spec, generator) for spec in specs if spec.name != without}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(TINY))
    return path


def random_tensor(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Values of a size that keeps the model's activations near 1, and its texts varied."""
    shape = spec.shapes[0]
    if spec.name.endswith("weight_packed"):
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator)
    if spec.name.endswith("weight_shape"):
        return torch.tensor([64, 64], dtype=torch.int32)
    if spec.name.endswith("weight_scale"):
        return (0.02 + 0.04 * torch.rand(shape, generator=generator)).bfloat16()
    noise = torch.randn(shape, generator=generator)
    if spec.kind == "norms":
        return (1 + 0.2 * noise).bfloat16()
    if spec.kind == "gate bias":
        return 0.2 * noise
    return (noise if spec.kind == "embedding" else noise * shape[-1] ** -0.5).bfloat16()
