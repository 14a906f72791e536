"""A gated MLP with integer weights as the only routed expert, which every token visits."""

from __future__ import annotations

import torch
from torch import Tensor

from .protocol import Activations, ExpertWeights, Int4Matrix, Int4Weight, Int8Matrix, IntegerWeight, Kernels


def single_expert(gate_up: IntegerWeight, down: IntegerWeight) -> ExpertWeights:
    """The experts of which this MLP is the only one; the same memory."""
    return ExpertWeights(_matrix(gate_up), _matrix(down))


def run_single_expert(kernels: Kernels, x: Activations, gate_up: IntegerWeight, down: IntegerWeight) -> Tensor:
    """`Kernels.mlp` by `Kernels.experts`."""
    everyone = torch.arange(len(x.values), dtype=torch.int32, device=kernels.device)
    return kernels.experts(x, everyone, torch.zeros_like(everyone), single_expert(gate_up, down))


def _matrix(weight: IntegerWeight) -> Int4Matrix | Int8Matrix:
    if isinstance(weight, Int4Weight):
        return Int4Matrix(weight.nibbles[None], weight.multipliers[None], weight.scale[None])
    return Int8Matrix(weight.values[None], weight.scale[None])
