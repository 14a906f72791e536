from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import normal

from flyray.kernels.protocol import ActivationFormat, Kernels

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_int8_matches_numpy(kernels: Kernels, row: list[float]) -> None:
    x = np.array([row], dtype=np.float32)
    result = kernels.quantize(torch.from_numpy(x), ActivationFormat.INT8)
    assert result.scale is not None
    scale = np.abs(x).max() / np.float32(127)
    assert result.scale.tolist() == [scale]
    if scale > 0:
        with np.errstate(over="ignore"):
            expected = np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
    else:
        expected = np.zeros_like(x, dtype=np.int8)
    assert np.array_equal(result.values.numpy(), expected)


def test_int8_rounds_half_to_even(kernels: Kernels) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    assert kernels.quantize(x, ActivationFormat.INT8).values.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


def test_fp8_matches_torch(kernels: Kernels) -> None:
    x = normal(1, 50, 77) * torch.logspace(-6, 6, 50)[:, None]
    x[:, 1::2] *= 1e-3
    result = kernels.quantize(x, ActivationFormat.FP8)
    scale = x.abs().amax(1) / 448.0
    assert result.scale is not None
    assert torch.equal(result.scale, scale)
    expected = (x / scale[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(result.values.float(), expected.float())


@pytest.mark.parametrize("format", [ActivationFormat.INT8, ActivationFormat.FP8])
def test_zero_and_non_finite_rows(kernels: Kernels, format: ActivationFormat) -> None:
    x = normal(2, 4, 20)
    x[0] = 0.0
    x[1, 3], x[2, 19] = torch.inf, torch.nan
    result = kernels.quantize(x, format)
    assert result.scale is not None
    assert result.scale[0] == 0.0
    assert bool(result.scale[1:3].isnan().all())
    assert bool((result.values[:3].float() == 0.0).all())
    assert bool(result.scale[3].isfinite())


def test_float_passes_through(kernels: Kernels) -> None:
    x = normal(3, 2, 5)
    result = kernels.quantize(x, ActivationFormat.FLOAT)
    assert result.values is x
    assert result.scale is None
