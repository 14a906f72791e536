"""A backend of several sources, each operation run by the one that a `KernelPlan` chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .composition import BackendSource, KernelPlan, check_plan, operation_label
from .protocol import (
    ActivationFormat,
    Activations,
    AheadKernels,
    Chunk,
    Drawn,
    ExpertWeights,
    GateConfig,
    Graph,
    IntegerWeight,
    Kernels,
    LayerExperts,
    LinearWeight,
    PagedBatch,
    Sampled,
    SamplingRow,
    T,
    matrix_kind,
)
from .source import KernelSource

_SPLITTING = ("linear", "head_linear", "mla_attention")


class ComposedKernels:
    """`Kernels` of several sources on one device.

    base: a whole backend on that device, whose graphs record what all of them compute; it samples, and runs what no
    other source was chosen for. sources: all of the plan's, without it. Raises SourceError where one does not run here
    what the plan has it run.
    """

    def __init__(self, name: str, base: Kernels, sources: Sequence[KernelSource], plan: KernelPlan) -> None:
        every = [*sources, BackendSource(base)]
        check_plan(every, plan)
        by_name = {source.name: source for source in every}
        self.name, self.plan = name, plan
        self.device, self.activation_dtype, self.kv_dtype = base.device, base.activation_dtype, plan.shapes.kv_dtype
        self.query_dtype = torch.bfloat16 if self.kv_dtype is torch.bfloat16 else base.query_dtype
        self._base: Any = base
        self._chosen: dict[tuple[str, type | None], Any] = {}
        self._choices = {choice.label: choice for choice in plan.choices}
        for choice in plan.choices:
            self._chosen[choice.operation, choice.kind] = by_name[choice.source].kernels
        splitting = {choice.source for choice in plan.choices if choice.operation in _SPLITTING}
        self.splits_floats = any(by_name[name].splits_floats for name in splitting)
        leaving = {choice.source for choice in plan.choices if choice.operation in ("write_kv", "experts")}
        self.leaves_out = all(by_name[name].leaves_out for name in leaving)

    def source(self, operation: str, kind: type | None = None) -> str:
        """The name of the source that runs an operation, with weights of that kind."""
        choice = self._choices.get(operation_label(operation, kind))
        return choice.source if choice else self._base.name

    def relative_error(self, label: str) -> float:
        """`Promise.relative_error` of the source of an operation such as experts[Int4Matrix]."""
        choice = self._choices.get(label)
        return choice.promise.relative_error if choice else 0.0

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._of("rms_norm").rms_norm(x, weight, eps)

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, floats: bool = True
    ) -> tuple[Tensor, Activations]:
        return self._of("rms_norm_quantize").rms_norm_quantize(x, weight, eps, floats)

    def linear(self, x: Tensor | Activations, weight: LinearWeight, residual: Tensor | None = None) -> Tensor:
        kind = type(weight) if isinstance(weight, IntegerWeight) else Tensor
        return self._of("linear", kind).linear(x, weight, residual)

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._of("head_linear").head_linear(x, weight)

    def mlp(
        self, x: Activations, gate_up: IntegerWeight, down: IntegerWeight, residual: Tensor | None = None
    ) -> Tensor:
        return self._of("mlp", type(gate_up)).mlp(x, gate_up, down, residual)

    def absorb(self, q: Tensor, weight: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._of("absorb").absorb(q, weight, positions, cos, sin)

    def write_kv(
        self,
        pages: Tensor,
        slots: Tensor,
        rows: Tensor,
        norm: Tensor,
        eps: float,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        self._of("write_kv").write_kv(pages, slots, rows, norm, eps, positions, cos, sin)

    def mla_attention(self, q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, kv_lora_rank: int) -> Tensor:
        return self._of("mla_attention").mla_attention(q, pages, batch, scale, kv_lora_rank)

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
        return self._of("gate").gate(x, weight, bias, config)

    def quantize(self, x: Tensor, format: ActivationFormat) -> Activations:
        return self._of("quantize").quantize(x, format)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._of("silu_mul").silu_mul(gate_up)

    def prepare(self, weights: ExpertWeights) -> LayerExperts:
        return self._of("prepare", matrix_kind(weights.gate_up)).prepare(weights)

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: LayerExperts) -> Tensor:
        return self._of("experts", matrix_kind(weights.gate_up)).experts(x, pair_token, pair_expert, weights)

    def combine(self, slots: Tensor, weights: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
        return self._of("combine").combine(slots, weights, shared, residual)

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> Sampled:
        return self._base.sample(logits, rows)

    def take_rows(self, table: Tensor, rows: Tensor) -> Tensor:
        return self._of("take_rows").take_rows(table, rows)

    def capture(self, run: Callable[[], T], beside: Graph[object] | None = None) -> Graph[T]:
        return self._base.capture(run, beside)

    def _of(self, operation: str, kind: type | None = None) -> Any:
        return self._chosen.get((operation, kind), self._base)


class ComposedAheadKernels(ComposedKernels):
    """`AheadKernels` of sources that wait for nothing, and `ExpandingKernels`; the base, whose entries all sources
    read, is both too."""

    def draw(self, logits: Tensor, words: Tensor) -> Drawn:
        return self._base.draw(logits, words)

    def branch(self, rows: int, run: Callable[[], T]) -> T:
        return self._base.branch(rows, run)

    def join(self) -> None:
        self._base.join()

    def expanded_attention(
        self,
        q: Tensor,
        pages: Tensor,
        batch: PagedBatch,
        chunk: Chunk,
        up_key: Tensor,
        up_value: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        out: Tensor,
    ) -> None:
        self._base.expanded_attention(q, pages, batch, chunk, up_key, up_value, cos, sin, scale, out)


def compose(name: str, base: Kernels, sources: Sequence[KernelSource], plan: KernelPlan) -> ComposedKernels:
    """`ComposedKernels`, and such that a step can be begun while the last one runs where the base is."""
    kind = ComposedAheadKernels if isinstance(base, AheadKernels) else ComposedKernels
    return kind(name, base, sources, plan)


def kernel_name(kernels: Kernels, operation: str, kind: type | None = None) -> str:
    """What the precision plan prints for one operation, such as "cpu.experts". kind: of the weights that it multiplies,
    where it does."""
    if not callable(getattr(kernels, operation, None)):
        raise ValueError(f"backend {kernels.name} has no operation {operation!r}")
    source = kernels.source(operation, kind) if isinstance(kernels, ComposedKernels) else kernels.name
    return f"{source}.{operation}"


__all__ = ["ComposedAheadKernels", "ComposedKernels", "compose", "kernel_name"]
