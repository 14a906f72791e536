"""A GPU backend for tests that hold their tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from flyray.kernels.protocol import ActivationFormat, Activations, Kernels


class MovedKernels:
    """`Kernels` that takes and gives CPU tensors and computes with those of another device."""

    def __init__(self, kernels: Kernels) -> None:
        self.inner = kernels
        self.name, self.activation_dtype, self.kv_dtype = kernels.name, kernels.activation_dtype, kernels.kv_dtype
        self.query_dtype = kernels.query_dtype
        self.splits_floats, self.device = kernels.splits_floats, torch.device("cpu")

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        run = getattr(self.inner, operation)
        return lambda *arguments: moved(run(*moved(arguments, self.inner.device)), self.device)

    def quantize(self, x: Tensor, format: ActivationFormat) -> Activations:
        result = self.inner.quantize(there := x.to(self.inner.device), format)
        return Activations(format, x, None) if result.values is there else moved(result, self.device)

    def write_kv(self, pages: Tensor, *arguments: Any) -> None:
        there = pages.to(self.inner.device)
        self.inner.write_kv(there, *moved(arguments, self.inner.device))
        pages.copy_(there)

    def capture(self, run: object, beside: object = None) -> None:
        pytest.skip("a device graph reads tensors of its device: test_triton_gpu.py captures")


def triton_kernels(kv_dtype: torch.dtype) -> Kernels:
    """The Triton backend for CPU tensors; skips the test where there is no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from flyray.kernels.triton.backend import TritonKernels

    return cast(Kernels, MovedKernels(TritonKernels(torch.device("cuda", 0), kv_dtype)))


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, and those in tuples, lists and dataclasses, on that device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(each, device) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value
