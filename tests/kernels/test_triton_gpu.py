"""What the Triton backend promises beyond the suite that all backends share; on a GPU alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from kernel_cases import MATRIX_KINDS, expert_weights, int4_weight, int8_weight, normal, paged, pairs
from moved_kernels import moved
from test_graphs import ANGLES, BATCH, EMBEDDING, LATENT_NORM, PAGES, empty_pages
from test_selfcheck import KIMI
from torch import Tensor

from flyray.kernels.protocol import (
    ActivationFormat,
    ExpertMatrix,
    Int4Matrix,
    Int8Matrix,
    PagedBatch,
    activation_format,
)
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.selfcheck import KernelMismatch, self_check

if TYPE_CHECKING:
    from flyray.kernels.triton.backend import TritonKernels


@pytest.fixture(scope="module")
def gpu() -> TritonKernels:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from flyray.kernels.triton.backend import TritonKernels

    return TritonKernels(torch.device("cuda", 0))


def test_self_check_at_kimis_size(gpu: TritonKernels) -> None:
    results = self_check(gpu, KIMI, MATRIX_KINDS)
    assert all(result.allowed == 0.0 for result in results if "Int" in result.operation)


def test_self_check_catches_a_broken_kernel(gpu: TritonKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    from flyray.kernels.triton import experts

    whole = experts.quantize

    def broken(x: Tensor, format: ActivationFormat) -> object:
        rows = whole(x, format)
        rows.values[0, 0] += 1
        return rows

    monkeypatch.setattr(experts, "quantize", broken)
    with pytest.raises(KernelMismatch, match=r"triton\.experts\[Int4Matrix\]: largest error"):
        self_check(gpu, KIMI, (Int4Matrix,))


@pytest.mark.parametrize("kind", [Int4Matrix, Int8Matrix])
@pytest.mark.parametrize("count", [3, 100, 700, 5000])
def test_experts_in_every_regime_equal_the_reference(gpu: TritonKernels, kind: type[ExpertMatrix], count: int) -> None:
    weights, (token, expert) = expert_weights(kind, 7, 288, 160), pairs(300, 7, count)
    x = ReferenceKernels().quantize(normal(1, 300, 288), activation_format(weights.down))
    expected = ReferenceKernels().experts(x, token, expert, weights)
    prepared = gpu.prepare(moved(weights, gpu.device))
    actual = gpu.experts(*moved((x, token, expert), gpu.device), prepared)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("tokens", [1, 16, 33, 200, 513])
def test_integer_linears_at_every_number_of_rows(gpu: TritonKernels, tokens: int) -> None:
    x, reference = normal(2, tokens, 4096), ReferenceKernels()
    for weight in (int8_weight(300, 4096), int4_weight(300, 4096)):
        assert torch.equal(gpu.linear(x.cuda(), moved(weight, gpu.device)).cpu(), reference.linear(x, weight))


@pytest.mark.parametrize("tokens", [1, 70])
def test_parts_that_the_last_program_adds_are_whole_in_every_replay(gpu: TritonKernels, tokens: int) -> None:
    x, residual, weight = normal(2, tokens, 7168), normal(5, tokens, 2112), int4_weight(2112, 7168)
    expected = ReferenceKernels().linear(x, weight, residual).cuda()
    rows, added, moved_weight = *moved((x, residual), gpu.device), moved(weight, gpu.device)
    graph = gpu.capture(lambda: gpu.linear(rows, moved_weight, added))
    for _ in range(100):
        graph.result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(graph.result, expected)


def test_float_linears_give_a_row_the_same_bits_at_any_number_of_rows(gpu: TritonKernels) -> None:
    x = normal(3, 512, 1100).cuda()
    for weight in (normal(4, 200, 1100).cuda(), normal(4, 9000, 1100).bfloat16().cuda()):
        whole = gpu.linear(x, weight)
        for rows in (slice(0, 1), slice(5, 38), slice(100, 300)):
            assert torch.equal(gpu.linear(x[rows], weight), whole[rows])


@pytest.mark.parametrize("rows", [1, 8, 33, 40, 140])
def test_attention_gives_a_query_the_same_bits_among_any_others(gpu: TritonKernels, rows: int) -> None:
    """Of Kimi-K2.5's widths, in a prompt and in decode: one program a query, several, and contexts of several units."""
    batch, total = paged([2300], [2300], 16, 3, 5)
    pages = (normal(6, total, 16, 576) * 0.3).to(gpu.device, gpu.kv_dtype)
    q = (normal(7, 2300, 64, 576) * 0.3).to(gpu.device, gpu.query_dtype)
    prompt = gpu.mla_attention(q, pages, moved(batch, gpu.device), 0.14, 512)
    positions = torch.tensor([2047, 63, 64, 2048, 777, 2299, 0, 1000]).repeat(18)[:rows]
    begins, table = torch.arange(rows + 1, dtype=torch.int32), batch.page_table.repeat(rows, 1)
    decode = PagedBatch(begins, (positions + 1).to(torch.int32), table, positions, positions)
    seen = gpu.mla_attention(q[positions.cuda()], pages, moved(decode, gpu.device), 0.14, 512)
    assert torch.equal(seen, prompt[positions.cuda()])


def test_graphs(gpu: TritonKernels) -> None:
    weights = gpu.prepare(moved(expert_weights(Int4Matrix, 4, 64, 32), gpu.device))
    table, batch, tokens = EMBEDDING.cuda(), moved(BATCH, gpu.device), torch.tensor([4, 0, 19]).cuda()
    pages = empty_pages().to(gpu.device, gpu.kv_dtype)
    one, norm, angles = moved((torch.ones(3, 1), LATENT_NORM, ANGLES), gpu.device)
    pair_token, pair_expert = (
        torch.arange(3, dtype=torch.int32).cuda(),
        torch.tensor([1, 3, 1], dtype=torch.int32).cuda(),
    )

    def layer(pages: Tensor) -> Tensor:
        x = gpu.take_rows(table, tokens)
        gpu.write_kv(pages, batch.slots, x[:, :32], norm, 1e-6, batch.positions, angles, angles)
        seen = gpu.mla_attention(x.unflatten(1, (2, 32)), pages, batch, 0.2, 24)
        slots = gpu.experts(gpu.quantize(x, ActivationFormat.INT8), pair_token, pair_expert, weights)
        return gpu.combine(seen.view(3, 1, 48).repeat(1, 1, 2)[..., :64].contiguous(), one, slots, x)

    graph = gpu.capture(lambda: layer(pages))
    first = graph.result.clone()
    assert torch.equal(first, layer(empty_pages().to(gpu.device, gpu.kv_dtype)))
    tokens.copy_(torch.tensor([1, 2, 3]))
    graph.replay()
    eager = empty_pages().to(gpu.device, gpu.kv_dtype)
    assert torch.equal(graph.result, layer(eager))
    assert torch.equal(pages, eager)
    assert not torch.equal(graph.result, first)
    second = gpu.capture(lambda: gpu.take_rows(graph.result, torch.arange(3, device=gpu.device)), beside=graph)
    assert torch.equal(second.result, graph.result)
    assert pages.shape[0] == PAGES


def test_branches_of_a_graph(gpu: TritonKernels) -> None:
    """No memory that a branch reads or writes is another's before the join; what is not joined is so at the end."""
    x, weight, ones = normal(1, 40, 1024).cuda(), moved(int8_weight(1024, 1024), gpu.device), torch.ones(1024).cuda()

    def layers() -> Tensor:
        total = x
        for _ in range(8):
            rows = gpu.rms_norm_quantize(total, ones, 1e-6, floats=False)[1]
            aside = gpu.branch(len(x), lambda rows=rows: gpu.linear(rows, weight))
            straight = gpu.linear(gpu.linear(rows, weight), weight)
            del rows
            gpu.join()
            total = gpu.linear(straight, weight, aside)
        return gpu.branch(len(x), lambda: gpu.linear(total, weight))

    expected, graph = layers(), gpu.capture(layers)
    for _ in range(20):
        graph.replay()
        assert torch.equal(graph.result, expected)
