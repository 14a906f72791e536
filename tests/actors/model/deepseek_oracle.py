"""Random small DeepSeek-V3 models in transformers, and their checkpoints in every format, for oracle tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_checkpoint import ARCHITECTURE
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from flyray.kernels.formats import (
    dequantize_native,
    fold_scales,
    pack_awq,
    pack_multipliers,
    pack_native,
    quantize_int8_rows,
    quantize_native,
)

Tensors = dict[str, Tensor]
Writer = Callable[[Tensor], Tensors]

NATIVE = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"},
        }
    },
}


def small_text(**changes: Any) -> dict[str, Any]:
    """A text_config small enough for seconds of test, large enough for every format's groups."""
    return {**ARCHITECTURE, "vocab_size": 97, "max_position_embeddings": 128, **changes}


def random_model(text: dict[str, Any], seed: int) -> DeepseekV3ForCausalLM:
    """The model of a text_config in fp32, every weight one that bfloat16 holds, gate biases too large to ignore."""
    skipped = ("model_type", "scoring_func", "topk_method", "moe_layer_freq", "rope_theta", "rope_scaling")
    scaling = text["rope_scaling"]
    rope = {"rope_type": "default"} if scaling is None else {**scaling, "rope_type": "yarn"}
    config = DeepseekV3Config(
        **{key: value for key, value in text.items() if key not in skipped},
        rope_parameters={**rope, "rope_theta": text["rope_theta"]},
        attn_implementation="eager",
        experts_implementation="eager",
    )
    generator = torch.Generator().manual_seed(seed)
    model = DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("inv_freq"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "layernorm" in name or name.endswith("norm.weight"):
                values = 1 + 0.2 * noise
            elif name.endswith("e_score_correction_bias"):
                values = 0.2 * noise
            else:
                values = noise * (1.0 if "embed" in name else tensor.shape[-1] ** -0.5)
            tensor.copy_(values.bfloat16())
    return model


def oracle_logits(model: DeepseekV3ForCausalLM, tokens: list[int]) -> Tensor:
    """Logits [T, V] of every position, in one pass."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def expert_weights(model: DeepseekV3ForCausalLM, layer: int, expert: int) -> dict[str, Tensor]:
    """gate_proj, up_proj and down_proj of one routed expert, [N, K] float32 views of the model's own."""
    experts = model.model.layers[layer].mlp.experts
    gate, up = experts.gate_up_proj.data[expert].chunk(2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj.data[expert]}


def native_values(model: DeepseekV3ForCausalLM) -> None:
    """Rounds the routed experts to what the native INT4 format holds, as bfloat16 dequantizes it."""
    for weight in _all_expert_weights(model):
        values, scale = quantize_native(weight)
        weight.copy_(dequantize_native(pack_native(values), scale))


def published_tensors(model: DeepseekV3ForCausalLM, experts: Writer) -> Tensors:
    """Every tensor under its published name; `experts` writes one routed matrix, the rest is bfloat16."""
    tensors: Tensors = {}
    for name, tensor in model.state_dict().items():
        if ".mlp.experts." in name:
            continue
        tensors[name] = tensor.clone() if name.endswith("bias") else tensor.bfloat16()
    for layer in range(model.config.first_k_dense_replace, model.config.num_hidden_layers):
        for expert in range(model.config.n_routed_experts):
            for matrix, weight in expert_weights(model, layer, expert).items():
                at = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}"
                tensors |= {f"{at}.{suffix}": tensor for suffix, tensor in experts(weight).items()}
    return tensors


def save_checkpoint(
    path: Path, text: dict[str, Any], tensors: Tensors, quantization: dict[str, Any] | None, prefix: str = ""
) -> Path:
    """Writes a checkpoint folder in two files, wrapped as Kimi-K2.5 when there is a prefix."""
    path.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    for index in range(2):
        part = {prefix + name: tensors[name].contiguous() for name in names[index::2]}
        save_file(part, path / f"model-0000{index + 1}-of-000002.safetensors", metadata={"format": "pt"})
    text = text if quantization is None else text | {"quantization_config": quantization}
    config = {"model_type": "kimi_k25", "text_config": text} if prefix else text
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_bf16(weight: Tensor) -> Tensors:
    return {"weight": weight.bfloat16()}


def write_native(weight: Tensor) -> Tensors:
    values, scale = quantize_native(weight)
    shape = torch.tensor(weight.shape, dtype=torch.int32)
    return {"weight_packed": pack_native(values), "weight_scale": scale, "weight_shape": shape}


def write_w4a8(weight: Tensor) -> Tensors:
    values, scale = quantize_native(weight)
    folded = fold_scales(values, scale)
    return {
        "weight_packed": pack_native(values),
        "weight_multiplier": pack_multipliers(folded.multipliers),
        "weight_scale": folded.scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }


def write_w8a8(weight: Tensor) -> Tensors:
    values, scale = quantize_int8_rows(weight)
    return {"weight": values, "weight_scale": scale, "weight_zero_point": torch.zeros(len(scale), dtype=torch.int8)}


def write_w8a8_fp8(weight: Tensor) -> Tensors:
    scale = weight.abs().amax(1) / 448
    return {"weight": (weight / scale[:, None]).to(torch.float8_e4m3fn), "weight_scale": scale}


def write_w4a8_channel(weight: Tensor) -> Tensors:
    scale = weight.abs().amax() / 448
    rows = weight.abs().amax(1) / scale / 7.5
    values = (weight / scale / rows[:, None]).round().clamp(-8, 7).to(torch.int8)
    return {"weight": pack_awq(values), "weight_scale": scale, "weight_scale_2": rows}


def _all_expert_weights(model: DeepseekV3ForCausalLM) -> list[Tensor]:
    moe_layers = range(model.config.first_k_dense_replace, model.config.num_hidden_layers)
    return [
        weight
        for layer in moe_layers
        for expert in range(model.config.n_routed_experts)
        for weight in expert_weights(model, layer, expert).values()
    ]


def _quark(*weight: dict[str, Any]) -> dict[str, Any]:
    stages = list(weight) if len(weight) > 1 else weight[0]
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": stages},
        "export": {"pack_method": "reorder"},
        "exclude": ["*lm_head", "*self_attn*", "*shared_experts*", "re:.*mlp\\.(gate|up|down)_proj"],
    }


WRITERS: dict[str, Writer] = {
    "bf16": write_bf16,
    "w4a16": write_native,
    "w4a8": write_w4a8,
    "w8a8": write_w8a8,
    "w8a8-fp8": write_w8a8_fp8,
    "w4a8-channel": write_w4a8_channel,
}
# What config.json says of each.
QUANTIZATION: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "w4a16": NATIVE,
    "w4a8": {"quant_method": "flyray", "format": "w4a8"},
    "w8a8": _quark({"dtype": "int8", "qscheme": "per_channel"}),
    "w8a8-fp8": _quark({"dtype": "fp8_e4m3", "qscheme": "per_channel"}),
    "w4a8-channel": _quark({"dtype": "fp8_e4m3", "qscheme": "per_tensor"}, {"dtype": "int4", "qscheme": "per_channel"}),
}
