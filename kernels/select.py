"""Chooses a kernel backend by name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .protocol import Kernels
    from .quantizer import WeightQuantizer

# Torch is imported with a backend, not with this module: configuration only needs the names.
CPU_BACKENDS = ("cpu", "reference")
ACCELERATED = ("torch", "triton")
"""Backends that need a GPU of their own in each process."""
BACKENDS = CPU_BACKENDS + ACCELERATED


class NoAccelerator(ValueError):
    """A backend needs an accelerator that torch does not see."""


def select_kernels(backend: str, threads: int) -> Kernels:
    """The kernels of `backend` with `threads` compute threads, on this process's current accelerator if it needs one.

    Raises NoAccelerator where there is none, and a ValueError that lists the backends for another name. The reference
    backend computes on torch's intra-op threads, so it sets their number in this process.
    """
    _check(backend, threads)
    if backend == "cpu":
        from .cpu.backend import CpuKernels

        return CpuKernels(threads)
    import torch

    torch.set_num_threads(threads)
    return _torch_kernels(backend, _accelerator(backend) if backend in ACCELERATED else torch.device("cpu"))


def describe_kernels(backend: str, threads: int) -> Kernels:
    """Kernels to ask for names and sizes, not to compute with: they need no accelerator."""
    if backend not in ACCELERATED:
        return select_kernels(backend, threads)
    import torch

    return _torch_kernels(backend, torch.device("meta"))


def select_quantizer(backend: str, threads: int) -> WeightQuantizer:
    """The weight quantizer of `backend` with `threads` compute threads, as `select_kernels`; all give the same bits.

    Those of accelerated backends compute where the weights are."""
    _check(backend, threads)
    if backend == "cpu":
        from .cpu.quantizer import CpuQuantizer

        return CpuQuantizer(threads)
    import torch

    from .reference_quantizer import ReferenceQuantizer

    torch.set_num_threads(threads)
    return ReferenceQuantizer()


def kernel_name(kernels: Kernels, operation: str) -> str:
    """What the precision plan prints for one operation, such as "cpu.experts"."""
    if not callable(getattr(kernels, operation, None)):
        raise ValueError(f"backend {kernels.name} has no operation {operation!r}")
    return f"{kernels.name}.{operation}"


def _check(backend: str, threads: int) -> None:
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    if backend not in BACKENDS:
        raise ValueError(f"unknown kernel backend {backend!r}; known: {', '.join(BACKENDS)}")


def _torch_kernels(backend: str, device: torch.device) -> Kernels:
    if backend == "triton":
        if find_spec("triton") is None:
            raise ValueError(
                "backend: 'triton' needs the package triton, which torch for CUDA and for ROCm brings; it is not here"
            )
        from .triton.backend import TritonKernels

        return TritonKernels(device)
    from .reference import ReferenceKernels
    from .torch_kernels import TorchKernels

    return TorchKernels(device) if backend == "torch" else ReferenceKernels(device)


def _accelerator(backend: str) -> torch.device:
    """This process's current accelerator, with its index."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        raise NoAccelerator(
            f"backend: {backend!r} computes on a GPU, but torch {torch.__version__} sees none in this process; install "
            "a torch for CUDA or ROCm and its driver, or choose one of the backends for CPUs: "
            f"{', '.join(CPU_BACKENDS)}"
        )
    return torch.device(kind.type, torch.accelerator.current_device_index())
