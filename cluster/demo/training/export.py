"""The trained model as a checkpoint in native Kimi-K2.5's form: names, INT4 experts, configuration."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .architecture import Architecture, config, generation_config
from .model import EXPERTS, Block, Model, group_scales

PREFIX = "language_model."
NAMES = {
    "input_norm": "input_layernorm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "q_a": "self_attn.q_a_proj.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    "o": "self_attn.o_proj.weight",
    "dense_gate": "mlp.gate_proj.weight",
    "dense_up": "mlp.up_proj.weight",
    "dense_down": "mlp.down_proj.weight",
    "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight",
    "shared_down": "mlp.shared_experts.down_proj.weight",
    "gate": "mlp.gate.weight",
}
PROJECTIONS = {"expert_gate": "gate_proj", "expert_up": "up_proj", "expert_down": "down_proj"}
LARGEST_FILE = 14 * 2**20
NIBBLES = 8  # of a 32-bit word


def packed(values: Tensor) -> Tensor:
    """Integers ``[..., K]`` in [-8, 7] to words ``[..., K / 8] i32``: offset binary, least significant nibble first."""
    nibbles = (values.to(torch.int64) + 8).view(*values.shape[:-1], -1, NIBBLES)
    words = (nibbles << (4 * torch.arange(NIBBLES, device=values.device))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def expert_tensors(weight: Tensor) -> dict[str, Tensor]:
    """One expert's matrix ``[out, in]`` as ``weight_packed``, ``weight_scale`` and ``weight_shape``."""
    groups, scales = group_scales(weight)
    values = (groups / scales.float().clamp_min(1e-8)).round().clamp(-8, 7).view_as(weight)
    shape = torch.tensor(weight.shape, dtype=torch.int32)
    return {"weight_packed": packed(values).cpu(), "weight_scale": scales.squeeze(-1).cpu(), "weight_shape": shape}


def block_tensors(block: Block, prefix: str) -> dict[str, Tensor]:
    """One layer's tensors by their published names."""
    tensors: dict[str, Tensor] = {}
    for name, weight in block.named_parameters():
        if name not in EXPERTS:
            tensors[prefix + NAMES[name]] = weight.detach().to(torch.bfloat16).cpu()
            continue
        for expert, each in enumerate(weight.detach().unbind(0)):
            inner = f"{prefix}mlp.experts.{expert}.{PROJECTIONS[name]}."
            tensors |= {inner + key: value for key, value in expert_tensors(each).items()}
    if not block.is_dense:
        tensors[prefix + "mlp.gate.e_score_correction_bias"] = block.bias.float().cpu()
    return tensors


def checkpoint_tensors(model: Model) -> dict[str, Tensor]:
    """All tensors by their published names."""
    tensors = {
        PREFIX + "model.embed_tokens.weight": model.embedding.detach().to(torch.bfloat16).cpu(),
        PREFIX + "lm_head.weight": model.head.detach().to(torch.bfloat16).cpu(),
        PREFIX + "model.norm.weight": model.norm.detach().to(torch.bfloat16).cpu(),
    }
    for index, block in enumerate(model.blocks):
        tensors |= block_tensors(block, f"{PREFIX}model.layers.{index}.")
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sorting key that counts layers and experts as numbers."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor in a file, with its share of the header."""
    return tensor.numel() * tensor.element_size() + 200


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in files of at most :data:`LARGEST_FILE` bytes."""
    files: list[dict[str, Tensor]] = [{}]
    used = 0
    for name in sorted(tensors, key=natural):
        if used + size_of(tensors[name]) > LARGEST_FILE:
            files.append({})
            used = 0
        files[-1][name] = tensors[name]
        used += size_of(tensors[name])
    return files


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def save(model: Model, sizes: Architecture, folder: Path) -> None:
    """Writes weights, index and configuration; the tokenizer's files are copied in by the caller."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint_tensors(model)
    files = shards(tensors)
    places: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):06d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    write_json(folder / "config.json", config(sizes))
    write_json(folder / "generation_config.json", generation_config(sizes))
