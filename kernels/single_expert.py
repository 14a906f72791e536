"""A gated MLP with integer weights as the only routed expert, which every token visits."""

from __future__ import annotations

import torch
from torch import Tensor

from .protocol import ExpertWeights, Int4Matrix, Int4Weight, Int8Matrix, IntegerWeight


def single_expert(gate_up: IntegerWeight, down: IntegerWeight) -> ExpertWeights:
    """The experts of which this MLP is the only one; the same memory."""
    return ExpertWeights(_matrix(gate_up), _matrix(down))


def every_token(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """pair_token and pair_expert of `Kernels.experts` where every token visits the only expert."""
    everyone = torch.arange(tokens, dtype=torch.int32, device=device)
    return everyone, torch.zeros_like(everyone)


def _matrix(weight: IntegerWeight) -> Int4Matrix | Int8Matrix:
    if isinstance(weight, Int4Weight):
        return Int4Matrix(weight.nibbles[None], weight.multipliers[None], weight.scale[None])
    return Int8Matrix(weight.values[None], weight.scale[None])
