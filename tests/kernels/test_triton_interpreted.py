"""The integer products in Triton's interpreter, on the CPU, against the reference's bits; run in a process of its own,
for the interpreter is chosen when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends")

PROGRAM = """
import torch
from kernel_cases import expert_weights, int4_weight, int8_weight, normal, pairs
from flyray.kernels.checks import PairShapes
from flyray.kernels.protocol import ActivationFormat, Int4Matrix, Int8Matrix
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.triton.experts import run_experts
from flyray.kernels.triton.layouts import tile_experts
from flyray.kernels.triton.linear import integer_linear
from flyray.kernels.triton.rows import combine, silu_mul
from flyray.kernels.triton.tiles import TileTable

reference = ReferenceKernels()
for kind in (Int4Matrix, Int8Matrix):
    weights, (token, expert) = expert_weights(kind, 3, 288, 96), pairs(4, 3, 12)
    x = reference.quantize(normal(1, 4, 288), ActivationFormat.INT8)
    shapes = PairShapes(4, 12, 3, 288, 96)
    actual = run_experts(x, token, expert, tile_experts(weights), shapes, TileTable.of("default"))
    assert torch.equal(actual, reference.experts(x, token, expert, weights)), kind
for weight in (int8_weight(70, 160), int4_weight(70, 160)):
    x = normal(2, 3, 160)
    actual = integer_linear(reference.quantize(x, ActivationFormat.INT8), weight)
    assert torch.equal(actual, reference.linear(x, weight)), type(weight)
for make in (int8_weight, int4_weight):
    rows, gate_up, down = reference.quantize(normal(3, 3, 160), ActivationFormat.INT8), make(128, 160), make(160, 64)
    hidden = reference.quantize(silu_mul(integer_linear(rows, gate_up, True)), ActivationFormat.INT8)
    assert torch.equal(integer_linear(hidden, down, True), reference.mlp(rows, gate_up, down)), make
inputs = normal(4, 3, 5, 70), normal(5, 3, 5), normal(6, 3, 70), normal(7, 3, 70)
assert torch.allclose(combine(*inputs), reference.combine(*inputs), rtol=0, atol=1e-5)
"""


def test_integer_products_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
