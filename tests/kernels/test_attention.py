"""Paged latent attention against a float64 softmax, and its independence of pages, chunks and neighbours."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import cached, empty_pages, gathered, kept, normal, paged, unchanged
from split_products import assert_float_attention, assert_rounded_attention, assert_split_attention
from torch import Tensor

from flyray.kernels.protocol import Kernels, PagedBatch

FEW = settings(max_examples=25, deadline=None)


def softmax_oracle(q: Tensor, keys: Tensor, scale: float, rank: int) -> Tensor:
    count = q.shape[0]
    scores = torch.einsum("qhw,kw->qhk", q.double(), keys.double()) * scale
    hidden = torch.arange(keys.shape[0])[None] > torch.arange(keys.shape[0] - count, keys.shape[0])[:, None]
    return scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1) @ keys.double()[:, :rank]


@FEW
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 150)), min_size=0, max_size=4),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([2, 6, 8]),
    st.integers(1, 70),
    st.sampled_from([0.1, 3.0]),
    st.integers(0, 99),
)
def test_matches_a_plain_softmax(
    attending: Kernels,
    sizes: list[tuple[int, int]],
    heads: int,
    rank: int,
    rope: int,
    page_size: int,
    scale: float,
    seed: int,
) -> None:
    queries = [new for new, _ in sizes]
    batch, total = paged(queries, [new + past for new, past in sizes], page_size, 2, seed)
    pages = normal(seed, total, page_size, rank + rope)
    q = normal(seed + 1, sum(queries), heads, rank + rope)
    result = attending.mla_attention(q, cached(attending, pages, rank), batch, scale, rank)
    assert result.shape == (sum(queries), heads, rank)
    for sequence, (begin, end) in enumerate(zip(batch.query_start[:-1], batch.query_start[1:], strict=True)):
        keys = gathered(kept(attending, pages, rank), batch, sequence)
        expected = softmax_oracle(q[begin:end], keys, scale, rank)
        if attending.query_dtype is torch.bfloat16:
            assert_rounded_attention(result[begin:end], expected, q[begin:end], keys, scale)
        elif attending.splits_floats:
            assert_split_attention(result[begin:end], expected, q[begin:end], keys, scale)
        else:
            assert_float_attention(result[begin:end], expected, q[begin:end], keys, scale)


def run_in_chunks(kernels: Kernels, q: Tensor, cache: Tensor, cuts: list[int], page_size: int, seed: int) -> Tensor:
    """Attention of a whole prompt, its queries given chunk by chunk, on pages of one size in one random order."""
    results = []
    for begin, end in zip([0, *cuts], [*cuts, q.shape[0]], strict=True):
        batch, total = paged([end - begin], [end], page_size, 3, seed)
        # What stands beyond the context, here NaN, must not be read.
        pages = empty_pages(kernels, total, page_size, cache.shape[1] - 8, 8)
        owned = batch.page_table[0, : -(-end // page_size)].long()
        slots = (owned[:, None] * page_size + torch.arange(page_size)).flatten()[:end]
        rank = cache.shape[1] - 8
        kernels.write_kv(pages, slots, *unchanged(cache[:end], rank))
        results.append(kernels.mla_attention(q[begin:end].contiguous(), pages, batch, 0.2, rank))
    return torch.cat(results)


@settings(max_examples=6, deadline=None)
@given(st.sets(st.integers(1, 149), max_size=3), st.sampled_from([1, 7, 16, 64]), st.integers(0, 99))
def test_chunks_and_pages_do_not_change_a_bit(attending: Kernels, cuts: set[int], page_size: int, seed: int) -> None:
    q, cache = normal(1, 150, 3, 40), normal(2, 150, 40)
    whole = run_in_chunks(attending, q, cache, [], 16, 0)
    assert torch.equal(run_in_chunks(attending, q, cache, sorted(cuts), page_size, seed), whole)


def test_token_by_token_equals_prefill_to_the_bit(attending: Kernels) -> None:
    q, cache = normal(3, 70, 5, 40), normal(4, 70, 40)
    whole = run_in_chunks(attending, q, cache, [], 16, 0)
    assert torch.equal(run_in_chunks(attending, q, cache, list(range(1, 70)), 16, 1), whole)


def test_a_sequence_alone_equals_itself_in_a_batch(attending: Kernels) -> None:
    queries, contexts = [3, 1, 80, 1], [90, 65, 80, 1]
    batch, total = paged(queries, contexts, 16, 0, 5)
    pages, q = cached(attending, normal(6, total, 16, 48), 40), normal(7, sum(queries), 4, 48)
    together = attending.mla_attention(q, pages, batch, 0.3, 40)
    for sequence, (begin, end) in enumerate(zip(batch.query_start[:-1], batch.query_start[1:], strict=True)):
        one = PagedBatch(
            torch.tensor([0, int(end - begin)], dtype=torch.int32),
            batch.context_len[sequence : sequence + 1],
            batch.page_table[sequence : sequence + 1].contiguous(),
            batch.positions[begin:end],
            batch.slots[begin:end],
        )
        assert torch.equal(attending.mla_attention(q[begin:end], pages, one, 0.3, 40), together[begin:end])


def test_huge_scores_stay_finite(attending: Kernels) -> None:
    batch, total = paged([4], [100], 16, 0, 8)
    pages, q = normal(9, total, 16, 32) * 100, normal(10, 4, 2, 32) * 100
    result = attending.mla_attention(q, cached(attending, pages, 24), batch, 1.0, 24)
    expected = softmax_oracle(q, gathered(kept(attending, pages, 24), batch, 0), 1.0, 24)
    if attending.query_dtype is torch.bfloat16:  # the largest score takes all, whichever that is once they are rounded
        assert bool(result.isfinite().all())
        return
    assert torch.allclose(result.double(), expected, atol=1e-3)


def test_a_latent_that_is_not_finite_stays_visible(rounding: Kernels) -> None:
    batch, total = paged([1], [40], 16, 0, 8)
    pages, q = normal(9, total, 16, 48), normal(10, 1, 2, 48)
    page, offset = divmod(int(batch.slots[0]), 16)
    pages[page, offset, 5] = torch.inf
    assert bool(rounding.mla_attention(q, cached(rounding, pages, 40), batch, 1.0, 40).isnan().all())
