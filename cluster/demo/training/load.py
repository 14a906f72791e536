"""Reads an exported checkpoint back: into the training model, or as plain tensors for other implementations."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .architecture import GROUP, Architecture
from .export import NAMES, NIBBLES, PREFIX, PROJECTIONS
from .model import Model


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their published names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / name)
    return tensors


def unpacked(words: Tensor, scales: Tensor) -> Tensor:
    """``weight_packed [out, in / 8] i32`` and ``weight_scale [out, in / 32] bf16`` to ``[out, in] bf16``."""
    nibbles = (words[..., None] >> (4 * torch.arange(NIBBLES, dtype=torch.int32))) & 15
    groups = (nibbles - 8).reshape(words.shape[0], -1, GROUP).float()
    return (groups * scales.float()[..., None]).to(torch.bfloat16).flatten(1)


def expert(tensors: dict[str, Tensor], name: str) -> Tensor:
    """One expert's matrix, ``name`` without its last part."""
    return unpacked(tensors[name + ".weight_packed"], tensors[name + ".weight_scale"])


def load(folder: Path, sizes: Architecture | None = None) -> Model:
    """The checkpoint as a training model, with YaRN on."""
    sizes = sizes or Architecture()
    tensors, model = read_tensors(folder), Model(sizes)
    values = {
        "embedding": tensors[PREFIX + "model.embed_tokens.weight"],
        "head": tensors[PREFIX + "lm_head.weight"],
        "norm": tensors[PREFIX + "model.norm.weight"],
    }
    for index, block in enumerate(model.blocks):
        place = f"{PREFIX}model.layers.{index}."
        for name, _ in block.named_parameters():
            if name in NAMES:
                values[f"blocks.{index}.{name}"] = tensors[place + NAMES[name]]
            else:
                every = range(sizes.n_routed_experts)
                parts = [expert(tensors, f"{place}mlp.experts.{e}.{PROJECTIONS[name]}") for e in every]
                values[f"blocks.{index}.{name}"] = torch.stack(parts)
        if not block.is_dense:
            values[f"blocks.{index}.bias"] = tensors[place + "mlp.gate.e_score_correction_bias"]
    values = {name: value.float() for name, value in values.items()}
    model.load_state_dict(values | {n: b for n, b in model.named_buffers() if "frequencies" in n})
    model.yarn = True
    return model.eval()
