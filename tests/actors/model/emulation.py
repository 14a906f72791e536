"""Quantized experts and linears written down once more, in float64, to stand in transformers' model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flyray.kernels.formats import fold_scales, quantize_native


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
# Of checkpoints that were quantized from bfloat16 weights.
DIRECT = RECIPES | {"w8a8": Recipe("w8a8", int8_rows, int8_rows)}


class EmulatedExperts(nn.Module):
    """Routed experts with quantized weights and activations, one pair after the other, in float64; a recipe each."""

    def __init__(self, experts: Any, recipes: Sequence[Recipe]) -> None:
        super().__init__()
        self.activations = [recipe.activations for recipe in recipes]
        quantize = [recipe.weights for recipe in recipes]
        halves = [matrix.chunk(2) for matrix in experts.gate_up_proj.detach()]
        self.gate = [law(gate) for law, (gate, _) in zip(quantize, halves, strict=True)]
        self.up = [law(up) for law, (_, up) in zip(quantize, halves, strict=True)]
        self.down = [law(matrix) for law, matrix in zip(quantize, experts.down_proj.detach(), strict=True)]

    def pair(self, row: Tensor, expert: int) -> Tensor:
        """row [D] -> [D] float64."""
        x = self.activations[expert](row[None])[0]
        hidden = nn.functional.silu(self.gate[expert] @ x) * (self.up[expert] @ x)
        return self.down[expert] @ self.activations[expert](hidden[None])[0]

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = [
            sum(weight * self.pair(row, int(expert)) for expert, weight in zip(chosen, by, strict=True))
            for row, chosen, by in zip(hidden, ids, weights.double(), strict=True)
        ]
        return torch.stack(rows).to(hidden.dtype)


class EmulatedLinear(nn.Module):
    """A linear in INT8: weights per row, activations per token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.quantized = int8_rows(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return (int8_rows(rows) @ self.quantized.T).to(x.dtype).reshape(*x.shape[:-1], -1)
