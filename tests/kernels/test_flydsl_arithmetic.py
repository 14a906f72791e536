"""The index maps, the unpacking and the epilogue of the FlyDSL kernels, executed in NumPy: the reference's bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wave_machine import multiply_add, product

from flyray.kernels.flydsl import wave_maps as maps
from flyray.kernels.flydsl.layout import wave_experts, wave_matrix
from flyray.kernels.protocol import ActivationFormat, Bf16Matrix, ExpertWeights, Int4Matrix, Int8Matrix
from flyray.kernels.reference import ReferenceKernels

KERNELS = ReferenceKernels(torch.device("cpu"))


def int4(generator: torch.Generator, experts: int, rows: int, columns: int) -> Int4Matrix:
    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32).to(torch.uint8)

    scale = torch.rand(experts, rows, generator=generator) * 0.01
    return Int4Matrix(draw(256, experts, rows, columns // 2), 1 + draw(15, experts, rows, columns // 32), scale)


def int8(generator: torch.Generator, experts: int, rows: int, columns: int) -> Int8Matrix:
    values = torch.randint(-127, 128, (experts, rows, columns), generator=generator, dtype=torch.int32)
    return Int8Matrix(values.to(torch.int8), torch.rand(experts, rows, generator=generator) * 0.01)


def test_every_nibble_times_every_multiplier() -> None:
    nibbles = np.arange(16, dtype=np.uint64)
    for factor in range(16):
        for shift in range(8):
            word = (nibbles << np.uint64(4 * shift)) | np.uint64(0x88888888) & ~np.uint64(0xF << 4 * shift)
            added = np.uint64(maps.offset(factor) & 0xFFFFFFFF)
            halves = maps.unpacked(word, np.uint64(factor), added, multiply_add)
            found = halves[shift % 2].astype("<u4").view(np.int8).reshape(16, 4)
            # Nibble `shift` is in byte shift // 2; its neighbours are 8, of value 0.
            expected = np.zeros((16, 4), dtype=np.int8)
            expected[:, shift // 2] = (nibbles.astype(np.int64) - 8) * factor
            np.testing.assert_array_equal(found, expected)
            assert not halves[1 - shift % 2].astype("<u4").view(np.int8).any()


@pytest.mark.parametrize("make", [int4, int8])
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([32, 96, 160, 512]), st.integers(1, 16))
def test_products_are_the_references(make, seed: int, inner: int, hidden: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inner *= 32
    weights = ExpertWeights(make(generator, 2, 2 * inner, hidden), make(generator, 2, hidden, inner))
    x = KERNELS.quantize(torch.randn(tokens, hidden, generator=generator), ActivationFormat.INT8)
    laid = wave_experts(weights)
    for expert in range(2):
        ids = torch.full((tokens,), expert, dtype=torch.int32)
        expected = KERNELS.experts(x, torch.arange(tokens, dtype=torch.int32), ids, weights)
        block = torch.zeros(16, hidden, dtype=torch.int8)
        block[:tokens] = x.values
        scale = torch.zeros(16)
        scale[:tokens] = x.scale
        hidden_rows = product(laid.gate_up, expert, block, scale, laid.gate_up.scale)
        rows = KERNELS.quantize(hidden_rows, ActivationFormat.INT8)
        assert rows.scale is not None
        found = product(laid.down, expert, rows.values, rows.scale, laid.down.scale)
        assert torch.equal(found[:tokens], expected)


PROGRAM = """
import torch
from kernel_cases import expert_weights, normal
from wave_machine import machine_launcher
from flyray.kernels.flydsl.source import FlyDslSource
from flyray.kernels.protocol import ActivationFormat, Int4Matrix, Int8Matrix
from flyray.kernels.reference import ReferenceKernels

reference = ReferenceKernels()
for kind, tokens in ((Int4Matrix, 4), (Int8Matrix, 30)):
    weights, pairs = expert_weights(kind, 3, 288, 96), 3 * tokens
    x = reference.quantize(normal(1, tokens, 288), ActivationFormat.INT8)
    token = torch.arange(tokens, dtype=torch.int32).repeat_interleave(3)
    expert = torch.arange(pairs, dtype=torch.int32) * 7 % 3
    source = FlyDslSource(reference, "gfx942", machine_launcher)
    actual = source.experts(x, token, expert, source.prepare(weights))
    assert torch.equal(actual, reference.experts(x, token, expert, weights)), kind
"""


def test_experts_are_the_references() -> None:
    """Rounding between the products is Triton's, whose interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton.backends")
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_other_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="an expert matrix is a Bf16Matrix; FlyDSL kernels run INT4 and INT8"):
        wave_matrix(Bf16Matrix(torch.zeros(1, 32, 32, dtype=torch.bfloat16)), gated=True)
