from __future__ import annotations

from collections.abc import Iterator

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

TRITON = {"triton": torch.bfloat16, "triton float32 pages": torch.float32}


@pytest.fixture(scope="session", params=("reference", "composed", *TRITON, *CPU_VARIANTS))
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Every backend, the CPU one in each of its variants; Triton's, with either kind of pages, where there is a GPU;
    and one composed of CPU and reference."""
    if request.param == "composed":
        opened = open_cpu("portable", threads=2)
        yield composed_kernels(opened)
        opened.close()
        return
    if request.param == "reference" or request.param in TRITON:
        yield triton_kernels(TRITON[request.param]) if request.param in TRITON else ReferenceKernels()
        return
    opened = open_cpu(request.param, threads=2)
    yield opened
    opened.close()


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
