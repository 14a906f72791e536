"""The CPU backend in each of its variants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import pytest
import torch

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.cpu.converter import CpuConverter
from flyray.kernels.cpu.library import LibraryError
from flyray.kernels.cpu.quantizer import CpuQuantizer

CPU_VARIANTS = ("amx", "avx512", "avx2", "portable")


_Backend = TypeVar("_Backend", CpuKernels, CpuQuantizer, CpuConverter)


def open_cpu(variant: str, threads: int, kv_dtype: torch.dtype = torch.float32) -> CpuKernels:
    """The CPU kernels in one variant, skipping the test on a machine that cannot run it."""
    return _open(partial(CpuKernels, kv_dtype=kv_dtype), variant, threads)


def open_cpu_quantizer(variant: str, threads: int) -> CpuQuantizer:
    """The CPU weight quantizer in one variant, skipping the test on a machine that cannot run it."""
    return _open(CpuQuantizer, variant, threads)


def open_cpu_converter(variant: str, threads: int) -> CpuConverter:
    """The CPU weight converter in one variant, skipping the test on a machine that cannot run it."""
    return _open(CpuConverter, variant, threads)


def _open(backend: Callable[[int, str], _Backend], variant: str, threads: int) -> _Backend:
    try:
        return backend(threads, variant)
    except LibraryError as error:
        if "has no variant" not in str(error):
            raise
        pytest.skip(str(error))
