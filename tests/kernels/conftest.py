from __future__ import annotations

from collections.abc import Iterator

import pytest
from cpu_variants import CPU_VARIANTS, open_cpu

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.protocol import Kernels
from flyray.kernels.reference import ReferenceKernels


@pytest.fixture(scope="session", params=("reference", *CPU_VARIANTS))
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Every backend, the CPU one in each of its variants."""
    if request.param == "reference":
        yield ReferenceKernels()
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


@pytest.fixture(scope="session")
def reference() -> ReferenceKernels:
    return ReferenceKernels()
