"""A backend composed of two that run here, for the suite that every backend passes."""

from __future__ import annotations

import torch
from torch import Tensor

from flyray.kernels.composed import ComposedKernels, compose
from flyray.kernels.composition import BackendSource, choose
from flyray.kernels.protocol import (
    Bf16Matrix,
    Fp8Matrix,
    GateConfig,
    Int4Matrix,
    Int4Weight,
    Int8Matrix,
    Int8Weight,
    Kernels,
)
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.source import KernelShapes, LinearShape

SHAPES = KernelShapes(
    hidden_size=96,
    heads=4,
    q_lora_rank=None,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    moe_intermediate_size=64,
    experts=8,
    local_experts=4,
    gate=GateConfig(2, 1, 1, True, 1.0),
    expert_kinds=(Bf16Matrix, Fp8Matrix, Int4Matrix, Int8Matrix),
    linears=(LinearShape(Tensor, 96, 64), LinearShape(Int8Weight, 96, 64), LinearShape(Int4Weight, 96, 64)),
    kv_dtype=torch.float32,
    page_size=8,
)
# Neighbours in the model from different sources, and one operation's kinds from two.
_CPU = {"prepare", "experts", "rms_norm", "write_kv", "absorb", "mla_attention", "linear", "gate"}


class PartSource(BackendSource):
    """Some operations of a backend, as a library would have them."""

    def __init__(self, kernels: Kernels, operations: set[str]) -> None:
        super().__init__(kernels)
        self.operations = frozenset(operations)

    def refusal(self, operation: str, kind: type | None, shapes: KernelShapes) -> str:
        if kind in (Int8Matrix, Int4Weight):
            return f"{operation}: has no {kind.__name__}"
        return super().refusal(operation, kind, shapes)


def composed_kernels(cpu: Kernels) -> ComposedKernels:
    """Its experts and attention are the CPU backend's, its graphs the reference's."""
    base, part = ReferenceKernels(), PartSource(cpu, _CPU)
    return compose("composed", base, [part], choose([part, BackendSource(base)], SHAPES, {}))
