"""Products on tiles of bfloat16: near the reference at a model's sizes, and a row's bits at any number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cpu_variants import open_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import cached, gathered, normal, paged
from split_products import assert_near_rows
from test_attention import run_in_chunks, softmax_oracle

from flyray.kernels.cpu.backend import CpuKernels

FEW = settings(max_examples=12, deadline=None)


@pytest.fixture(scope="module")
def tiles() -> Iterator[CpuKernels]:
    opened = open_cpu("amx", threads=2)
    yield opened
    opened.close()


@pytest.mark.parametrize(("inner", "outputs"), [(128, 512), (512, 128), (1024, 300), (83, 75), (31, 40), (1, 17)])
def test_every_number_of_rows_gives_the_same_bits(tiles: CpuKernels, inner: int, outputs: int) -> None:
    x, weight = normal(1, 512, inner), normal(2, outputs, inner).bfloat16()
    together = tiles.linear(x, weight)
    assert_near_rows(together, x.double() @ weight.double().T)
    for count in (1, 2, 15, 16, 17, 31, 32, 33, 100):
        for begin in (0, 64, 512 - count):
            rows = slice(begin, begin + count)
            assert torch.equal(tiles.linear(x[rows], weight), together[rows])


@pytest.mark.parametrize(("inner", "outputs"), [(128, 512), (512, 128), (20, 37)])
def test_heads_are_products_of_their_own(tiles: CpuKernels, inner: int, outputs: int) -> None:
    x, weight = normal(3, 70, 5, inner), normal(4, 5, outputs, inner).bfloat16()
    together = tiles.head_linear(x, weight)
    for head in range(5):
        assert torch.equal(together[:, head], tiles.linear(x[:, head].contiguous(), weight[head].contiguous()))
    for begin, end in ((0, 1), (3, 19), (50, 70)):
        assert torch.equal(tiles.head_linear(x[begin:end], weight), together[begin:end])


@pytest.mark.parametrize(
    ("queries", "contexts"), [([1] * 4, [256, 700, 1, 1024]), ([256], [256]), ([130, 1], [600, 9])]
)
def test_attention_is_near_at_a_models_sizes(tiles: CpuKernels, queries: list[int], contexts: list[int]) -> None:
    batch, total = paged(queries, contexts, 16, 2, 1)
    pages, q = normal(5, total, 16, 576), normal(6, sum(queries), 8, 576)
    result = tiles.mla_attention(q, cached(tiles, pages, 512), batch, 192**-0.5, 512)
    for sequence, (begin, end) in enumerate(zip(batch.query_start[:-1], batch.query_start[1:], strict=True)):
        expected = softmax_oracle(q[begin:end], gathered(pages, batch, sequence), 192**-0.5, 512)
        assert_near_rows(result[begin:end], expected)


@FEW
@given(st.sets(st.integers(1, 299), max_size=5), st.sampled_from([1, 3, 8, 20, 64]), st.integers(0, 99))
def test_a_prompt_in_chunks_gives_the_same_bits(tiles: CpuKernels, cuts: set[int], heads: int, seed: int) -> None:
    """Chunks of few rows take blocks at once, those of many one after another."""
    q, cache = normal(seed, 300, heads, 72), normal(seed + 1, 300, 72)
    whole = run_in_chunks(tiles, q, cache, [], 16, 0)
    assert torch.equal(run_in_chunks(tiles, q, cache, sorted(cuts), 32, seed), whole)


def test_a_context_of_many_blocks_gives_the_same_bits(tiles: CpuKernels) -> None:
    """More blocks than are converted at a time, seen by many rows together and by one query alone."""
    q, cache = normal(7, 4300, 2, 24), normal(8, 4300, 24)
    whole = run_in_chunks(tiles, q, cache, [], 16, 0)
    last = run_in_chunks(tiles, q, cache, [4299], 16, 2)
    assert torch.equal(last, whole)
