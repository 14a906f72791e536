"""The reference's code on an accelerator: nothing stays on the host, and every bit is the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pretend_device import DEVICE, pretend_device

from flyray.kernels.formats import quantize_int8_rows
from flyray.kernels.protocol import Bf16Matrix, Fp8Matrix, GateConfig, Int4Matrix, Int8Matrix
from flyray.kernels.reference_quantizer import ReferenceQuantizer
from flyray.kernels.select import ACCELERATED, SOURCES, NoAccelerator, describe_kernels, select_kernels
from flyray.kernels.selfcheck import CheckShapes, self_check
from flyray.kernels.torch_kernels import TorchKernels

SHAPES = CheckShapes(
    hidden=64,
    heads=2,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=20,
    experts=8,
    intermediate=32,
    page_size=8,
    gate=GateConfig(4, 2, 1, True, 2.827),
)


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretend_device() as device:
        yield device


def test_every_operation_gives_the_bits_of_the_cpu(device: torch.device) -> None:
    results = self_check(TorchKernels(device), SHAPES, (Int4Matrix, Int8Matrix, Fp8Matrix, Bf16Matrix))
    assert {result.operation: result.max_error for result in results if result.max_error} == {}


def test_the_device_gives_another_number_where_a_divisor_is_on_the_host(device: torch.device) -> None:
    """So that the test before this one sees such a division."""
    values = torch.arange(1.0, 1000.0)
    assert not torch.equal((values.to(device) / 127).cpu(), values / 127)


def test_weights_are_quantized_on_the_device_to_the_same_bits(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    packed = torch.randint(-(2**31), 2**31, (9, 8), generator=generator, dtype=torch.int64).to(torch.int32)
    scale = torch.rand(9, 2, generator=generator).to(torch.bfloat16) + 0.1
    weight = torch.randn(9, 64, generator=generator)
    quantizer = ReferenceQuantizer()
    here, there = quantizer.fold(packed, scale), quantizer.fold(packed.to(device), scale.to(device))
    for name, expected in vars(here).items():
        assert torch.equal(getattr(there, name).cpu(), expected), name
    for clip in (False, True):
        rows = quantizer.row_scales(weight, 8, None, clip)
        assert torch.equal(quantizer.row_scales(weight.to(device), 8, None, clip).cpu(), rows)
        rounded = quantizer.round_rows(weight.to(device), rows.to(device), 8).cpu()
        assert torch.equal(rounded, quantizer.round_rows(weight, rows, 8))
    for found, expected in zip(quantize_int8_rows(weight.to(device)), quantize_int8_rows(weight), strict=True):
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("backend", sorted({*ACCELERATED} - {*SOURCES}))
def test_a_backend_says_what_it_lacks(backend: str) -> None:
    if torch.accelerator.is_available():
        assert select_kernels(backend, 1).device.type != "cpu"
        return
    with pytest.raises(NoAccelerator, match=f"backend: '{backend}' computes on a GPU, but torch .* sees none"):
        select_kernels(backend, 1)


@pytest.mark.parametrize("backend", sorted({*ACCELERATED} - {*SOURCES}))
def test_what_a_backend_is_can_be_asked_without_an_accelerator(backend: str) -> None:
    assert describe_kernels(backend, 1).name == backend
    assert DEVICE.type != describe_kernels(backend, 1).device.type
