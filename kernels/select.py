"""Chooses a kernel backend by name."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .composition import KernelPlan, SourceOrder
    from .protocol import Kernels
    from .quantizer import WeightQuantizer
    from .source import KernelShapes
    from .triton.backend import TritonKernels

# Torch is imported with a backend, not with this module: configuration only needs the names.
CPU_BACKENDS = ("cpu", "reference")
ACCELERATED = ("torch", "triton", "rocm")
"""Backends that need a GPU of their own in each process."""
BACKENDS = CPU_BACKENDS + ACCELERATED
ROUNDED_KV_DTYPES = ("int8", "fp8")
EXPANDING = ("reference", *ACCELERATED)
"""Backends with `protocol.ExpandingKernels`."""
KV_DTYPES = ("auto", "bf16", "f32", *ROUNDED_KV_DTYPES)
"""Of KV pages; "auto": the backend's own, f32 on CPUs and of "torch", bf16 of the others."""
SOURCES = {"rocm": ("flydsl", "aiter", "triton")}
"""The backends that are composed of several sources, in the order in which these are asked."""


class NoAccelerator(ValueError):
    """A backend needs an accelerator that torch does not see."""


def check_kv_dtype(backend: str, kv_dtype: str) -> None:
    """Raises ValueError for KV pages of a dtype that the backend does not keep."""
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype: {kv_dtype!r} is none of {', '.join(KV_DTYPES)}")
    if kv_dtype == "bf16" and backend not in ("triton", "rocm"):
        raise ValueError(
            f"kv_dtype: 'bf16', but the backend {backend!r} keeps KV pages in f32, int8 or fp8; 'triton' in bf16 too"
        )


def check_expanding(backend: str, kv_dtype: str) -> None:
    """Raises ValueError where a backend has no expanded attention over KV pages of that dtype."""
    if backend not in EXPANDING:
        raise ValueError(
            f"prompt_attention: 'expanded', but the backend {backend!r} has none; {', '.join(EXPANDING)} do, and "
            "'absorbed' is right for all"
        )
    if kv_dtype == "f32" and backend in ("triton", "rocm"):
        raise ValueError(
            f"prompt_attention: 'expanded' multiplies in bfloat16 with {backend!r}, but kv_dtype 'f32' is for answers "
            "as on CPUs; one of 'absorbed' and kv_dtype 'bf16' is right"
        )


def check_sources(backend: str, names: Collection[str]) -> None:
    """Raises ValueError for sources that the backend is not composed of."""
    if names and backend not in SOURCES:
        raise ValueError(f"kernels: the backend {backend!r} is one source; {', '.join(SOURCES)} has several")
    for name in names:
        if name not in SOURCES[backend]:
            raise ValueError(f"kernels: {name!r} is no source of {backend!r}; {', '.join(SOURCES[backend])} are")


def device_kv_dtype(kv_dtype: str) -> torch.dtype:
    """Of KV pages of Triton's backend and those composed with it."""
    return _kv_dtype("bf16" if kv_dtype == "auto" else kv_dtype)


def plan_kernels(backend: str, kv_dtype: str, shapes: KernelShapes, orders: SourceOrder) -> KernelPlan | None:
    """Which source runs which operation; None for a backend that is one. Needs no accelerator. shapes: of KV pages of
    `kv_dtype`. Raises what `composition.choose` raises."""
    if backend not in SOURCES:
        return None
    import torch

    from .rocm import plan_rocm

    return plan_rocm(_triton_kernels(torch.device("meta"), kv_dtype), shapes, orders)


def select_kernels(backend: str, threads: int, kv_dtype: str = "auto", plan: KernelPlan | None = None) -> Kernels:
    """The kernels of `backend` with `threads` compute threads, on this process's current accelerator if it needs one.

    kv_dtype: of KV_DTYPES. plan: of `plan_kernels`, for the same backend and kv_dtype. Raises NoAccelerator where there
    is none, SourceError where the plan cannot be followed here, and a ValueError that lists the backends for another
    name. The reference backend computes on torch's intra-op threads, so it sets their number in this process.
    """
    _check(backend, threads)
    check_kv_dtype(backend, kv_dtype)
    if backend == "cpu":
        from .cpu.backend import CpuKernels

        return CpuKernels(threads, kv_dtype=_own_kv_dtype(kv_dtype))
    import torch

    torch.set_num_threads(threads)
    device = _accelerator(backend) if backend in ACCELERATED else torch.device("cpu")
    return _torch_kernels(backend, device, kv_dtype, plan)


def describe_kernels(backend: str, threads: int, kv_dtype: str = "auto", plan: KernelPlan | None = None) -> Kernels:
    """Kernels to ask for names and sizes, not to compute with: they need no accelerator."""
    if backend not in ACCELERATED:
        return select_kernels(backend, threads, kv_dtype)
    import torch

    check_kv_dtype(backend, kv_dtype)
    return _torch_kernels(backend, torch.device("meta"), kv_dtype, plan)


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


def _check(backend: str, threads: int) -> None:
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    if backend not in BACKENDS:
        raise ValueError(f"unknown kernel backend {backend!r}; known: {', '.join(BACKENDS)}")


def _torch_kernels(backend: str, device: torch.device, kv_dtype: str, plan: KernelPlan | None) -> Kernels:
    if backend == "rocm":
        from .rocm import rocm_kernels

        return rocm_kernels(_triton_kernels(device, kv_dtype), plan)
    if backend == "triton":
        return _triton_kernels(device, kv_dtype)
    from .reference import ReferenceKernels
    from .torch_kernels import TorchKernels

    kernels = TorchKernels if backend == "torch" else ReferenceKernels
    return kernels(device, _own_kv_dtype(kv_dtype))


def _own_kv_dtype(kv_dtype: str) -> torch.dtype:
    """Of KV pages of the other backends."""
    return _kv_dtype("f32" if kv_dtype == "auto" else kv_dtype)


def _kv_dtype(name: str) -> torch.dtype:
    import torch

    return {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[name]


def _triton_kernels(device: torch.device, kv_dtype: str) -> TritonKernels:
    if find_spec("triton") is None:
        raise ValueError(
            "backend: GPUs need the package triton, which torch for CUDA and for ROCm brings; it is not here"
        )
    from .triton.backend import TritonKernels

    return TritonKernels(device, device_kv_dtype(kv_dtype))


def _accelerator(backend: str) -> torch.device:
    """This process's current accelerator, with its index."""
    import torch

    if backend == "rocm":
        from .rocm import missing_rocm

        if missing := missing_rocm():
            raise NoAccelerator(f"backend: 'rocm' computes on AMD's GPUs and {missing}")
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        raise NoAccelerator(
            f"backend: {backend!r} computes on a GPU, but torch {torch.__version__} sees none in this process; install "
            "a torch for CUDA or ROCm and its driver, or choose one of the backends for CPUs: "
            f"{', '.join(CPU_BACKENDS)}"
        )
    return torch.device(kind.type, torch.accelerator.current_device_index())
