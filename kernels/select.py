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
KV_DTYPES = ("auto", "bf16", "f32")
"""Of KV pages; "auto": the backend's own."""


class NoAccelerator(ValueError):
    """A backend needs an accelerator that torch does not see."""


def check_kv_dtype(backend: str, kv_dtype: str) -> None:
    """Raises ValueError for KV pages of a dtype that the backend does not keep."""
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype: {kv_dtype!r} is none of {', '.join(KV_DTYPES)}")
    if kv_dtype == "bf16" and backend != "triton":
        raise ValueError(f"kv_dtype: 'bf16', but the backend {backend!r} keeps KV pages in f32; 'triton' in either")


def select_kernels(backend: str, threads: int, kv_dtype: str = "auto") -> Kernels:
    """The kernels of `backend` with `threads` compute threads, on this process's current accelerator if it needs one.

    kv_dtype: of KV_DTYPES. Raises NoAccelerator where there is none, and a ValueError that lists the backends for
    another name. The reference backend computes on torch's intra-op threads, so it sets their number in this process.
    """
    _check(backend, threads)
    check_kv_dtype(backend, kv_dtype)
    if backend == "cpu":
        from .cpu.backend import CpuKernels

        return CpuKernels(threads)
    import torch

    torch.set_num_threads(threads)
    device = _accelerator(backend) if backend in ACCELERATED else torch.device("cpu")
    return _torch_kernels(backend, device, kv_dtype)


def describe_kernels(backend: str, threads: int, kv_dtype: str = "auto") -> Kernels:
    """Kernels to ask for names and sizes, not to compute with: they need no accelerator."""
    if backend not in ACCELERATED:
        return select_kernels(backend, threads, kv_dtype)
    import torch

    check_kv_dtype(backend, kv_dtype)
    return _torch_kernels(backend, torch.device("meta"), kv_dtype)


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


def _torch_kernels(backend: str, device: torch.device, kv_dtype: str) -> Kernels:
    if backend == "triton":
        if find_spec("triton") is None:
            raise ValueError(
                "backend: 'triton' needs the package triton, which torch for CUDA and for ROCm brings; it is not here"
            )
        import torch

        from .triton.backend import TritonKernels

        return TritonKernels(device, torch.float32 if kv_dtype == "f32" else torch.bfloat16)
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
