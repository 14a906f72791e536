"""The CPU backend in each of its variants."""

from __future__ import annotations

import pytest

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.cpu.library import LibraryError

CPU_VARIANTS = ("avx512", "avx2", "portable")


def open_cpu(variant: str, threads: int) -> CpuKernels:
    """The CPU kernels in one variant, skipping the test on a machine that cannot run it."""
    try:
        return CpuKernels(threads, variant)
    except LibraryError as error:
        if "has no variant" not in str(error):
            raise
        pytest.skip(str(error))
