"""Quantized experts against the same quantization written down once more, in float64, inside transformers' model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_oracle import (
    QUANTIZATION,
    WRITERS,
    oracle_logits,
    published_tensors,
    random_model,
    relative,
    save_checkpoint,
    small_text,
)
from torch import Tensor, nn

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.kv_pages import KvPages
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.model.stages import ModelStages
from flyray.actors.weights import load_shard
from flyray.kernels.formats import fold_scales, quantize_native
from flyray.kernels.select import BACKENDS, select_kernels

TEXT = small_text(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
TOKENS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(4)).tolist()


def int8_rows(weight: Tensor) -> Tensor:
    """[N, K] -> what INT8 with one scale a row makes of it, float64. The format divides in float32, and halves of a
    step do occur between INT4 groups, so the rounding is done there too."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return torch.round(weight.float() / scale).double() * scale.double()


def folded(weight: Tensor) -> Tensor:
    """[N, K] -> native values times integer multipliers times row scales, float64."""
    values, group_scale = quantize_native(weight)
    fold = fold_scales(values, group_scale)
    groups = values.double().unflatten(1, (-1, 32)) * fold.multipliers.double()[..., None]
    return groups.flatten(1) * fold.scale.double()[:, None]


def native(weight: Tensor) -> Tensor:
    values, scale = quantize_native(weight)
    return (values.double().unflatten(1, (-1, 32)) * scale.double()[..., None]).flatten(1)


def fp8_rows(weight: Tensor) -> Tensor:
    """[N, K] -> what float8_e4m3fn with one scale a row makes of it, float64."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def int4_rows(weight: Tensor) -> Tensor:
    """[N, K] -> what INT4 with two scales, of the matrix and of the row, makes of it, float64."""
    first = weight.abs().amax() / 448
    second = weight.abs().amax(1, keepdim=True) / first / 7.5
    return torch.round(weight / first / second).clamp(-8, 7).double() * (first * second).double()


@dataclass(frozen=True)
class Recipe:
    """disk: the checkpoint's format. weights and activations: what is left of [N, K] or [T, K], float64."""

    disk: str
    weights: Callable[[Tensor], Tensor]
    activations: Callable[[Tensor], Tensor]


RECIPES = {
    "w8a8": Recipe("w4a16", lambda weight: int8_rows(native(weight)), int8_rows),
    "w4a8": Recipe("w4a16", folded, int8_rows),
    "w8a8-fp8": Recipe("w8a8-fp8", fp8_rows, fp8_rows),
    "w4a8-channel": Recipe("w4a8-channel", int4_rows, int8_rows),
}


class EmulatedExperts(nn.Module):
    """Routed experts with quantized weights and activations, one pair after the other, in float64."""

    def __init__(self, experts: Any, recipe: Recipe) -> None:
        super().__init__()
        self.activations, quantize = recipe.activations, recipe.weights
        halves = [matrix.chunk(2) for matrix in experts.gate_up_proj.detach()]
        self.gate = [quantize(gate) for gate, _ in halves]
        self.up = [quantize(up) for _, up in halves]
        self.down = [quantize(matrix) for matrix in experts.down_proj.detach()]

    def pair(self, row: Tensor, expert: int) -> Tensor:
        """row [D] -> [D] float64."""
        x = self.activations(row[None])[0]
        hidden = nn.functional.silu(self.gate[expert] @ x) * (self.up[expert] @ x)
        return self.down[expert] @ self.activations(hidden[None])[0]

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = [
            sum(weight * self.pair(row, int(expert)) for expert, weight in zip(chosen, by, strict=True))
            for row, chosen, by in zip(hidden, ids, weights.double(), strict=True)
        ]
        return torch.stack(rows).to(hidden.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", RECIPES)
def test_expert_outputs_and_logits(precision: str, backend: str, tmp_path: Path) -> None:
    recipe, source, emulated = RECIPES[precision], random_model(TEXT, 21), random_model(TEXT, 21)
    for layer in (1, 2):
        emulated.model.layers[layer].mlp.experts = EmulatedExperts(source.model.layers[layer].mlp.experts, recipe)
    tensors = published_tensors(source, WRITERS[recipe.disk])
    checkpoint = Checkpoint(save_checkpoint(tmp_path, TEXT, tensors, QUANTIZATION[recipe.disk]))
    config, kernels = ModelConfig.from_dict(checkpoint.config), select_kernels(backend, 1)
    weights = load_shard(checkpoint, config, precision, range(8), kernels)

    stages = ModelStages(config, weights, kernels, KvPages.allocate(config, 1, 1, kernels))
    routing = stages.gate(1, torch.randn(6, 64, generator=torch.Generator().manual_seed(9)))
    rows, ids = torch.arange(6, dtype=torch.int32).repeat_interleave(3), routing.ids.flatten()
    experts = emulated.model.layers[1].mlp.experts
    pairs = zip(routing.normed[rows], ids.tolist(), strict=True)
    expected = torch.stack([experts.pair(row, expert) for row, expert in pairs])
    assert relative(stages.experts(1, routing.activations, rows, ids), expected) < 1e-6

    logits = SingleProcessModel(config, weights, kernels, 64).prefill(TOKENS)
    oracle = oracle_logits(emulated, TOKENS)
    assert relative(logits, oracle) < 1e-5
    # So close only because the same quantization was written down: without it the logits are elsewhere.
    assert relative(logits, oracle_logits(source, TOKENS)) > 1e-3
