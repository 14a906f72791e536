"""Which rows of a step attend with expanded keys and values, and that the rest is what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoint import TINY

from flyray.actors.model.config import ModelConfig
from flyray.actors.model.kv_pages import KvPages
from flyray.actors.model.prompt_attention import least_expanded_rows, long_chunks, others
from flyray.actors.model.stages import ModelStages
from flyray.actors.random_weights import random_shard
from flyray.cluster.bench.kernel_cases import paged_batch
from flyray.cluster.synthesize import Synthesis
from flyray.kernels.select import select_kernels

CONFIG = ModelConfig.from_dict(TINY)


def test_least_rows_of_kimi() -> None:
    """512 * 256 / (1024 - 256), by hand."""
    assert least_expanded_rows(ModelConfig.from_dict(Synthesis("kimi-k2.5").config())) == 171


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 200), st.integers(0, 3000))
def test_from_the_least_rows_on_expanding_takes_fewer_multiplications(
    key: int, value: int, rank: int, past: int
) -> None:
    """Counted query by query, at and above the least rows behind any prefix."""
    config = replace(CONFIG, qk_nope_head_dim=key, v_head_dim=value, kv_lora_rank=rank)
    if 2 * rank <= key + value:
        with pytest.raises(ValueError, match="prompt_attention: 'expanded' saves nothing where kv_lora_rank is"):
            least_expanded_rows(config)
        return
    rows, rope = least_expanded_rows(config), config.qk_rope_head_dim
    pairs = sum(past + row + 1 for row in range(rows))
    absorbed = pairs * (2 * rank + rope) + rows * rank * (key + value)
    expanded = pairs * (key + rope + value) + (past + rows) * rank * (key + value)
    assert expanded <= absorbed


def test_a_step_is_long_chunks_and_the_others() -> None:
    queries, contexts = [1, 90, 1, 5, 80, 1, 1], [9, 120, 7, 30, 80, 3, 4]
    batch, _ = paged_batch(queries, contexts)
    assert [(chunk.sequence, chunk.rows) for chunk in batch.chunks] == [(1, 90), (3, 5), (4, 80)]
    long = long_chunks(batch, 80)
    assert [(chunk.first, chunk.rows, chunk.context) for chunk in long] == [(1, 90, 120), (97, 80, 80)]
    parts = list(others(batch, long))
    assert [(part.rows.start, part.rows.stop) for part in parts] == [(0, 1), (91, 97), (177, 179)]
    assert [part.batch.query_start.tolist() for part in parts] == [[0, 1], [0, 1, 6], [0, 1, 2]]
    assert [part.batch.context_len.tolist() for part in parts] == [[9], [7, 30], [3, 4]]
    for part in parts:
        assert torch.equal(part.batch.positions, batch.positions[part.rows])
    assert torch.equal(parts[1].batch.page_table, batch.page_table[2:4])
    assert next(others(batch, ())).batch.query_start.tolist() == batch.query_start.tolist()


def test_a_mixed_step_has_the_same_attention() -> None:
    """Long chunks within rounding, all other rows to the bit."""
    kernels = select_kernels("reference", 1)
    weights = random_shard(CONFIG, "w4a16", range(8), kernels)
    batch, pages = paged_batch([1, 75, 6, 1], [20, 90, 6, 3])
    kv = KvPages.allocate(CONFIG, pages, 16, kernels)
    kv.values[0] = torch.randn(kv.values[0].shape, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(83, CONFIG.hidden_size, generator=torch.Generator().manual_seed(2))
    absorbed = ModelStages(CONFIG, weights, kernels, kv).attention(0, hidden, batch)
    expanded = ModelStages(CONFIG, weights, kernels, kv, "expanded").attention(0, hidden, batch)
    chunk = slice(1, 76)
    assert not torch.equal(absorbed[chunk], expanded[chunk])
    assert float((absorbed - expanded).abs().max()) < 1e-5 * float(absorbed.abs().max())
    absorbed[chunk] = expanded[chunk]
    assert torch.equal(absorbed, expanded)


def test_kernels_that_cannot_are_refused() -> None:
    kernels = select_kernels("cpu", 1)
    weights = random_shard(CONFIG, "w4a16", range(8), kernels)
    with pytest.raises(ValueError, match="prompt_attention: the backend 'cpu' has no expanded attention"):
        ModelStages(CONFIG, weights, kernels, KvPages.allocate(CONFIG, 2, 16, kernels), "expanded")
