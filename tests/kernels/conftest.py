from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from composed_kernels import composed_kernels
from cpu_variants import CPU_VARIANTS, open_cpu, open_cpu_quantizer
from moved_kernels import triton_kernels

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.cpu.quantizer import CpuQuantizer
from flyray.kernels.protocol import Kernels
from flyray.kernels.quantizer import WeightQuantizer
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.reference_quantizer import ReferenceQuantizer

BACKENDS = {"reference": torch.float32, "triton": torch.bfloat16, "triton float32 pages": torch.float32}
BACKENDS |= dict.fromkeys(("composed", *CPU_VARIANTS), torch.float32)
ROUNDED = {
    f"{name} {format} pages": dtype
    for name in ("reference", "triton", *CPU_VARIANTS)
    for format, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn))
}


@contextmanager
def opened(name: str, kv_dtype: torch.dtype) -> Iterator[Kernels]:
    """A backend by the first word of `name`; Triton's where there is a GPU."""
    backend = name.partition(" ")[0]
    if backend in ("reference", "triton"):
        yield triton_kernels(kv_dtype) if backend == "triton" else ReferenceKernels(kv_dtype=kv_dtype)
        return
    cpu = open_cpu("portable" if backend == "composed" else backend, 2, kv_dtype)
    yield composed_kernels(cpu) if backend == "composed" else cpu
    cpu.close()


@pytest.fixture(scope="session", params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Every backend, the CPU one in each of its variants, Triton's with either kind of floats in KV pages, and one
    composed of CPU and reference."""
    with opened(request.param, BACKENDS[request.param]) as kernels:
        yield kernels


@pytest.fixture(scope="session", params=ROUNDED)
def rounding(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Every backend with either kind of KV pages in 8 bits."""
    with opened(request.param, ROUNDED[request.param]) as kernels:
        yield kernels


@pytest.fixture(scope="session", params=BACKENDS | ROUNDED)
def attending(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Every backend with every kind of KV pages."""
    with opened(request.param, (BACKENDS | ROUNDED)[request.param]) as kernels:
        yield kernels


@pytest.fixture(scope="session", params=CPU_VARIANTS)
def cpu(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    """The CPU backend in each of its variants."""
    opened = open_cpu(request.param, threads=2)
    yield opened
    opened.close()


@pytest.fixture(scope="session", params=("reference", *CPU_VARIANTS))
def quantizer(request: pytest.FixtureRequest) -> Iterator[WeightQuantizer]:
    """Every weight quantizer, the CPU one in each of its variants."""
    if request.param == "reference":
        yield ReferenceQuantizer()
        return
    opened = open_cpu_quantizer(request.param, threads=2)
    yield opened
    opened.close()


@pytest.fixture(scope="session", params=CPU_VARIANTS)
def cpu_quantizer(request: pytest.FixtureRequest) -> Iterator[CpuQuantizer]:
    """The CPU weight quantizer in each of its variants."""
    opened = open_cpu_quantizer(request.param, threads=2)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def reference() -> ReferenceKernels:
    return ReferenceKernels()
