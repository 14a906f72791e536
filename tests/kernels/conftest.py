from __future__ import annotations

from collections.abc import Iterator

import pytest

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.cpu.library import LibraryError
from flyray.kernels.protocol import Kernels
from flyray.kernels.reference import ReferenceKernels

CPU_VARIANTS = ("avx512", "avx2", "portable")


def open_cpu(variant: str, threads: int) -> CpuKernels:
    """The CPU kernels in one variant, skipping the test on a machine that cannot run it."""
    try:
        return CpuKernels(threads, variant)
    except LibraryError as error:
        if "has no variant" not in str(error):
            raise
        pytest.skip(str(error))


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
