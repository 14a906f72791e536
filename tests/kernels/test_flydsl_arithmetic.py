"""The index maps, the unpacking and the epilogue of the FlyDSL kernels, executed in NumPy: the reference's bits."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product as product_of
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wave_machine import multiply_add, product, reads, writes

from flyray.kernels.flydsl import wave_maps as maps
from flyray.kernels.flydsl.layout import WaveMatrix, wave_experts, wave_matrix
from flyray.kernels.flydsl.shape import BLOCKS, ProductShape
from flyray.kernels.protocol import ActivationFormat, Activations, Bf16Matrix, ExpertWeights, Int4Matrix, Int8Matrix
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


def multiply(x: Activations, matrix: WaveMatrix, expert: int, block: int) -> torch.Tensor:
    """All rows of x as the first places of one block, times one expert's matrix."""
    assert x.scale is not None
    tokens, rows = len(x.scale), matrix.rows // 2 if matrix.gated else matrix.rows
    shape = ProductShape(matrix.bits, matrix.inner, rows, matrix.units, matrix.gated, block)
    begins = np.full(block, -1)
    begins[:tokens] = np.arange(tokens) * matrix.inner
    scale = torch.nn.functional.pad(x.scale, (0, block - tokens), value=torch.nan)
    return product(shape, matrix, expert, x.values.numpy().ravel(), begins, scale)[:tokens]


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
@given(
    st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([32, 96, 160, 544]), st.sampled_from(BLOCKS), st.data()
)
def test_products_are_the_references(make, seed: int, inner: int, hidden: int, block: int, data: st.DataObject) -> None:
    generator, tokens = torch.Generator().manual_seed(seed), data.draw(st.integers(1, block))
    inner *= 32
    weights = ExpertWeights(make(generator, 2, 2 * inner, hidden), make(generator, 2, hidden, inner))
    x = KERNELS.quantize(torch.randn(tokens, hidden, generator=generator), ActivationFormat.INT8)
    laid = wave_experts(weights)
    for expert in range(2):
        ids = torch.full((tokens,), expert, dtype=torch.int32)
        expected = KERNELS.experts(x, torch.arange(tokens, dtype=torch.int32), ids, weights)
        rows = KERNELS.quantize(multiply(x, laid.gate_up, expert, block), ActivationFormat.INT8)
        assert torch.equal(multiply(rows, laid.down, expert, block), expected)


PROGRAM = """
import torch
from kernel_cases import expert_weights, normal
from wave_machine import machine_launcher
from flyray.kernels.flydsl.source import FlyDslSource
from flyray.kernels.protocol import ActivationFormat, Int4Matrix, Int8Matrix
from flyray.kernels.reference import ReferenceKernels

reference = ReferenceKernels()
for kind, tokens in ((Int4Matrix, 2), (Int4Matrix, 4), (Int8Matrix, 30)):
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


PHASES = {
    "consecutive": [range(first, first + 8) for first in range(0, 64, 8)],
    "paired": [
        [half + first + lane for first in (one, other) for lane in range(4)]
        for half in (0, 32)
        for one, other in ((0, 20), (4, 16), (8, 28), (12, 24))
    ],
}
"""Which lanes the LDS serves at once when each moves 16 bytes: writes and, in the other form, reads (AMD's Composable
Kernel, "LDS bank conflicts")."""


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", BLOCKS)
def test_lds_serves_every_lane_at_once(bits: int, tokens: int) -> None:
    shape = ProductShape(bits, 7168, 2048, 128, True, tokens)
    written = [word[first : first + 64] for _, _, word in writes(shape) for first in range(0, len(word), 64)]
    places = product_of(range(shape.chunk), range(shape.token_tiles), range(shape.runs))
    read = [reads(shape, *place) for place in places]
    assert sorted(np.concatenate(written).tolist()) == list(range(0, shape.buffer_words, 4))
    assert set(np.concatenate(read).tolist()) == set(range(0, shape.buffer_words, 4))
    for words, phases in [(w, ["consecutive"]) for w in written] + [(w, [*PHASES]) for w in read]:
        for phase in phases:
            for lanes in PHASES[phase]:
                different = set(words[list(lanes)].tolist())
                assert len({word // 4 % 8 for word in different}) == len(different)


def test_other_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="an expert matrix is a Bf16Matrix; FlyDSL kernels run INT4 and INT8"):
        wave_matrix(Bf16Matrix(torch.zeros(1, 32, 32, dtype=torch.bfloat16)), gated=True)
