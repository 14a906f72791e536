"""A row's bits depend on that row alone: not on its neighbours, and not on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cpu_variants import CPU_VARIANTS, open_cpu
from kernel_cases import (
    MATRIX_KINDS,
    cached,
    empty_pages,
    expert_weights,
    int4_weight,
    int8_weight,
    normal,
    paged,
    pairs,
)
from torch import Tensor

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.protocol import ActivationFormat, Activations, ExpertMatrix, GateConfig, Kernels, activation_format

TOKENS = 67
CONFIG = GateConfig(4, 4, 2, True, 2.5)
POSITIONS = torch.arange(TOKENS) * 3 % 50
TABLE = normal(1, 50, 8)
NORM, ADDED = normal(7, 83), (normal(11, TOKENS, 4), normal(12, TOKENS, 45), normal(13, TOKENS, 45))
RESIDUAL = normal(16, TOKENS, 75)
MLP = int4_weight(192, 64), int4_weight(64, 96)

ROW_KERNELS: dict[str, tuple[Tensor, Callable[[Kernels, Tensor, Tensor], Tensor]]] = {
    "linear bf16": (normal(2, TOKENS, 83), lambda k, x, _: k.linear(x, normal(3, 75, 83).bfloat16())),
    "linear": (normal(2, TOKENS, 83), lambda k, x, _: k.linear(x, normal(3, 75, 83))),
    "linear int8": (normal(2, TOKENS, 83), lambda k, x, _: k.linear(x, int8_weight(75, 83))),
    "linear int4": (normal(2, TOKENS, 96), lambda k, x, _: k.linear(x, int4_weight(75, 96))),
    "head_linear": (normal(4, TOKENS, 3, 20), lambda k, x, _: k.head_linear(x, normal(5, 3, 37, 20))),
    "rms_norm": (normal(6, TOKENS, 83), lambda k, x, _: k.rms_norm(x, NORM, 1e-6)),
    "linear of rows": (
        normal(2, TOKENS, 83),
        lambda k, x, rows: k.linear(k.quantize(x, ActivationFormat.INT8), int8_weight(75, 83), RESIDUAL[rows]),
    ),
    "write_kv": (normal(8, TOKENS, 16), lambda k, x, rows: written(k, x, POSITIONS[rows])),
    "silu_mul": (normal(9, TOKENS, 90), lambda k, x, _: k.silu_mul(x)),
    "combine": (normal(10, TOKENS, 4, 45), lambda k, x, rows: k.combine(x, *(each[rows] for each in ADDED))),
    "rms_norm_quantize": (normal(6, TOKENS, 83), lambda k, x, _: restored(k.rms_norm_quantize(x, NORM, 1e-6)[1])),
    "mlp": (normal(6, TOKENS, 64), lambda k, x, _: k.mlp(k.quantize(x, ActivationFormat.INT8), *MLP)),
    "absorb": (
        normal(8, TOKENS, 3, 36),
        lambda k, x, rows: k.absorb(x, normal(5, 3, 37, 20), POSITIONS[rows], TABLE.cos(), TABLE.sin()),
    ),
    "gate": (
        normal(12, TOKENS, 40),
        lambda k, x, _: torch.cat([part.double() for part in k.gate(x, normal(13, 24, 40), normal(14, 24), CONFIG)], 1),
    ),
    "quantize": (normal(15, TOKENS, 45), lambda k, x, _: restored(k.quantize(x, ActivationFormat.INT8))),
    "quantize fp8": (normal(15, TOKENS, 45), lambda k, x, _: restored(k.quantize(x, ActivationFormat.FP8))),
}


def written(kernels: Kernels, x: Tensor, positions: Tensor) -> Tensor:
    """The bytes of entries made of rows [T, 16], a page each."""
    pages = empty_pages(kernels, len(x), 1, 10, 6)
    kernels.write_kv(pages, torch.arange(len(x)), x, NORM[:10], 1e-6, positions, TABLE[:, :3].cos(), TABLE[:, :3].sin())
    return pages.view(torch.uint8)


def restored(x: Activations) -> Tensor:
    assert x.scale is not None
    return torch.cat([x.values.float(), x.scale[:, None]], dim=1)


@pytest.mark.parametrize("name", ROW_KERNELS)
def test_a_row_alone_equals_itself_in_a_batch(kernels: Kernels, name: str) -> None:
    x, run = ROW_KERNELS[name]
    everything = run(kernels, x, torch.arange(TOKENS))
    for begin, end in [(row, row + 1) for row in range(TOKENS)] + [(0, 2), (5, 12), (3, 67)]:
        rows = torch.arange(begin, end)
        assert torch.equal(run(kernels, x[rows], rows), everything[rows])


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_a_pair_alone_equals_itself_in_a_batch(kernels: Kernels, kind: type[ExpertMatrix]) -> None:
    weights = expert_weights(kind, 6, 64, 96)
    token, expert = pairs(9, 6, 60)
    x = kernels.quantize(normal(1, 9, 64), activation_format(weights.down))
    everything = kernels.experts(x, token, expert, weights)
    for pair in range(60):
        one = slice(pair, pair + 1)
        assert torch.equal(kernels.experts(x, token[one], expert[one], weights), everything[one])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    assert torch.equal(kernels.experts(x, token[order], expert[order], weights), everything[order])


@pytest.fixture(scope="module", params=CPU_VARIANTS)
def one_and_three(request: pytest.FixtureRequest) -> Iterator[tuple[CpuKernels, CpuKernels]]:
    one, three = open_cpu(request.param, 1), open_cpu(request.param, 3)
    yield one, three
    one.close()
    three.close()


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_threads_do_not_change_experts(one_and_three: tuple[CpuKernels, CpuKernels], kind: type[ExpertMatrix]) -> None:
    one, three = one_and_three
    weights = expert_weights(kind, 6, 128, 96)
    token, expert = pairs(30, 6, 90)
    x = one.quantize(normal(1, 30, 128), activation_format(weights.down))
    expected = one.experts(x, token, expert, weights)
    for _ in range(10):
        assert torch.equal(three.experts(x, token, expert, weights), expected)


def test_threads_do_not_change_float_kernels(one_and_three: tuple[CpuKernels, CpuKernels]) -> None:
    one, three = one_and_three
    x, weight = normal(2, 70, 200), normal(3, 300, 200)
    batch, total = paged([60, 1, 9], [90, 200, 9], 16, 0, 4)
    pages, q = cached(one, normal(5, total, 16, 72), 64), normal(6, 70, 5, 72)
    runs: list[Callable[[Kernels], Tensor]] = [
        lambda k: k.linear(x, weight),
        lambda k: k.linear(x, weight.bfloat16()),
        lambda k: k.linear(x, int8_weight(300, 200)),
        lambda k: k.linear(x[:, :192].contiguous(), int4_weight(300, 192)),
        lambda k: k.head_linear(x.view(70, 4, 50), weight.view(4, 75 * 4, 50)),
        lambda k: k.gate(x, weight, weight[:, 0].contiguous(), CONFIG)[1],
        lambda k: k.mla_attention(q, pages, batch, 0.2, 64),
        lambda k: k.silu_mul(weight),
        lambda k: restored(k.quantize(weight.view(30, 2000), ActivationFormat.INT8)),
    ]
    for run in runs:
        expected = run(one)
        for _ in range(5):
            assert torch.equal(run(three), expected)
