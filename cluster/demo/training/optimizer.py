"""Muon for matrices and experts, AdamW for embedding, head, router and norms.

Muon follows Keller Jordan's write-up (2024): momentum, then five Newton-Schulz steps that make the update nearly
orthogonal.
"""

import math

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95
BY_ADAM = ("embedding", "head", "gate")


def orthogonalized(update: Tensor) -> Tensor:
    """``[m, rows, cols]`` to nearly orthogonal matrices, in bf16 on a GPU."""
    a, b, c = NEWTON_SCHULZ
    x = update.bfloat16() if update.is_cuda else update
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if is_tall else x


class Optimizer:
    """One step for all weights; matrices of one shape go through Muon in one batch."""

    def __init__(self, model: nn.Module, matrix_rate: float, other_rate: float, decay: float = 0.05) -> None:
        self.matrix_rate, self.other_rate, self.decay = matrix_rate, other_rate, decay
        named = list(model.named_parameters())
        matrices: list[Tensor] = [
            weight for name, weight in named if weight.ndim >= 2 and name.split(".")[-1] not in BY_ADAM
        ]
        chosen = {id(weight) for weight in matrices}
        self.shapes: dict[tuple[int, ...], list[Tensor]] = {}
        for weight in matrices:
            self.shapes.setdefault(tuple(weight.shape[-2:]), []).append(weight)
        self.momenta = {
            shape: torch.zeros(sum(self.count(w) for w in weights), *shape, device=weights[0].device)
            for shape, weights in self.shapes.items()
        }
        others = [weight for _, weight in named if id(weight) not in chosen]
        self.adam = torch.optim.AdamW(
            others, lr=other_rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=others[0].is_cuda
        )

    @staticmethod
    def count(weight: Tensor) -> int:
        """How many matrices a weight holds (the experts' are stacked)."""
        return weight.numel() // (weight.shape[-1] * weight.shape[-2])

    @staticmethod
    def gradient(weight: Tensor) -> Tensor:
        """A weight's gradient; raises RuntimeError if the loss did not reach the weight."""
        if weight.grad is None:
            raise RuntimeError(f"a weight of shape {tuple(weight.shape)} has no gradient: call backward() first")
        return weight.grad

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step at ``share`` of the learning rates."""
        for shape, weights in self.shapes.items():
            gradient = torch.cat([self.gradient(w).view(-1, *shape) for w in weights])
            momentum = self.momenta[shape].lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalized(gradient.lerp(momentum, MOMENTUM)).float()
            parts = update.split([self.count(w) for w in weights])
            rate = self.matrix_rate * share * math.sqrt(max(1, shape[0] / shape[1]))
            moves = [part.view_as(w) for part, w in zip(parts, weights, strict=True)]
            # torch has no public name for the fused updates of a list of tensors
            torch._foreach_mul_(weights, 1 - self.matrix_rate * share * self.decay)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(weights, moves, alpha=-rate)  # pyright: ignore[reportPrivateImportUsage]
        for group in self.adam.param_groups:
            group["lr"] = self.other_rate * share
        self.adam.step()
