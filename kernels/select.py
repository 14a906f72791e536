"""Chooses a kernel backend by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .protocol import Kernels
    from .quantizer import WeightQuantizer

# Torch is imported with a backend, not with this module: configuration only needs the names.
BACKENDS = ("cpu", "reference")


def select_kernels(backend: str, threads: int) -> Kernels:
    """The kernels of `backend` with `threads` compute threads; a ValueError lists the backends there are.

    The reference backend computes on torch's intra-op threads, so it sets their number in this process.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    if backend == "reference":
        import torch

        from .reference import ReferenceKernels

        torch.set_num_threads(threads)
        return ReferenceKernels()
    if backend == "cpu":
        from .cpu.backend import CpuKernels

        return CpuKernels(threads)
    raise ValueError(f"unknown kernel backend {backend!r}; known: {', '.join(BACKENDS)}")


def select_quantizer(backend: str, threads: int) -> WeightQuantizer:
    """The weight quantizer of `backend` with `threads` compute threads, as `select_kernels`; all give the same bits."""
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    if backend == "reference":
        import torch

        from .reference_quantizer import ReferenceQuantizer

        torch.set_num_threads(threads)
        return ReferenceQuantizer()
    if backend == "cpu":
        from .cpu.quantizer import CpuQuantizer

        return CpuQuantizer(threads)
    raise ValueError(f"unknown kernel backend {backend!r}; known: {', '.join(BACKENDS)}")


def kernel_name(kernels: Kernels, operation: str) -> str:
    """What the precision plan prints for one operation, such as "cpu.experts"."""
    if not callable(getattr(kernels, operation, None)):
        raise ValueError(f"backend {kernels.name} has no operation {operation!r}")
    return f"{kernels.name}.{operation}"
