"""Each kernel against the reference."""

from __future__ import annotations

from ...actors.kernel_shapes import kernel_shapes, rounded_linears
from ...actors.model.config import ModelConfig
from ...actors.shard_check import check_shapes
from ...kernels.composition import KernelPlan
from ...kernels.protocol import Int4Matrix, Int8Matrix
from ...kernels.select import device_kv_dtype, plan_kernels, select_kernels
from ...kernels.selfcheck import KernelMismatch, self_check
from .finding import Finding

_PAGE_SIZE = 16
_MATRICES = (Int4Matrix, Int8Matrix)


def check_backend(backend: str, threads: int, model: ModelConfig) -> Finding:
    """All operations of a backend in a model's shapes, as a shard checks them when it starts."""
    about = f"kernels of {backend}"
    try:
        kernels = select_kernels(backend, threads, plan=_plan(backend, model))
        results = self_check(kernels, check_shapes(model, _PAGE_SIZE), _MATRICES)
    except (KernelMismatch, ValueError) as error:
        return Finding(about, "fault", str(error))
    worst = max(results, key=lambda result: result.max_error / result.allowed if result.allowed else 0.0)
    exact = sum(not result.max_error for result in results)
    text = f"{len(results)} operations, {exact} equal to the bit; largest error {worst.max_error:.2g} of "
    return Finding(about, "ok", f"{text}{worst.allowed:.2g} allowed, in {worst.operation}")


def _plan(backend: str, model: ModelConfig) -> KernelPlan | None:
    """Which source runs which operation, where a backend has several."""
    kv_dtype = device_kv_dtype("auto")
    every = model.n_routed_experts
    shapes = kernel_shapes(model, ("w4a8", "w8a8"), rounded_linears((), ()), every, kv_dtype, _PAGE_SIZE)
    return plan_kernels(backend, "auto", shapes, {})
