"""FlyDSL as a source of kernels: the routed experts in INT4 and INT8 on gfx942, to the reference's bits."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from ..checks import INT4_GROUP, MAX_INT8_INNER, ArgumentChecks
from ..protocol import (
    Activations,
    ExpertWeights,
    Int4Matrix,
    Int8Matrix,
    Kernels,
    LayerExperts,
)
from ..source import KernelShapes, Promise
from .experts import Launcher, run_experts, warm_up
from .layout import WaveExperts, wave_experts
from .shape import ProductShape

TARGETS = ("gfx942",)
_KINDS = (Int4Matrix, Int8Matrix)
_ROW_STEP = 16
"""Rows of INT8 activations are read in runs of so many bytes, which begin with the row."""


class FlyDslSource:
    """`KernelSource`. base: the kernels that it stands beside, whose device it computes on, or "meta" to be asked
    alone. target: the GPU's architecture, such as gfx942. launcher: of products, FlyDSL's where there is none."""

    name = "flydsl"
    operations = frozenset({"prepare", "experts"})
    leaves_out = True
    splits_floats = False

    def __init__(self, base: Kernels, target: str, launcher: Callable[[ProductShape], Launcher] | None = None) -> None:
        self._target = target
        self._launcher = launcher or _flydsl_launcher
        self._launches = launcher is not None or base.device.type != "meta"
        self._check = ArgumentChecks(torch.float32, base.device)

    @property
    def kernels(self) -> FlyDslSource:
        return self

    def promise(self, operation: str) -> Promise:
        """All of the protocol, to the bit."""
        return Promise()

    def refusal(self, operation: str, kind: type | None, shapes: KernelShapes) -> str:
        if operation not in self.operations:
            return f"has no {operation}"
        if find_spec("flydsl") is None:
            return "the package flydsl is not installed; install it with: pip install 'flyray[rocm]'"
        if self._target not in TARGETS:
            return f"is written for {', '.join(TARGETS)}, not {self._target}"
        if kind not in _KINDS:
            return f"multiplies INT4 and INT8 experts (w4a8, w8a8), not {'none' if kind is None else kind.__name__}"
        step = INT4_GROUP if kind is Int4Matrix else _ROW_STEP
        for name in ("hidden_size", "moe_intermediate_size"):
            size = getattr(shapes, name)
            if size % step or size > MAX_INT8_INNER:
                return f"{name} is {size}, not a multiple of {step} up to {MAX_INT8_INNER}"
        return ""

    def prepare(self, weights: ExpertWeights) -> WaveExperts:
        """The layout that `experts` multiplies. Every product that it may need is compiled and launched once, on a
        block without pairs, so that no request and no graph waits for a compiler; FlyDSL launches none on "meta"."""
        for name, matrix in (("weights.gate_up", weights.gate_up), ("weights.down", weights.down)):
            self._check.expert_matrix(name, matrix)
        laid = wave_experts(weights)
        if self._launches:
            warm_up(laid, self._launcher)
        return laid

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: LayerExperts) -> Tensor:
        """Plain weights are laid out anew by each call, which takes longer than the product."""
        if isinstance(weights, ExpertWeights):
            weights = self.prepare(weights)
        if not isinstance(weights, WaveExperts):
            raise ValueError(f"experts: weights is {type(weights).__name__}, another backend's layout of ExpertWeights")
        shapes = self._check.prepared_experts(x, pair_token, pair_expert, weights.gate_up, weights.down)
        if shapes.pairs == 0:
            return torch.zeros((0, shapes.hidden), dtype=torch.float32, device=x.values.device)
        return run_experts(x, pair_token, pair_expert, weights, self._launcher)


def _flydsl_launcher(shape: ProductShape) -> Launcher:
    """Of the package, which is imported only where a product is launched."""
    from .launch import product

    return product(shape)


__all__ = ["TARGETS", "FlyDslSource"]
