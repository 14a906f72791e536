"""Which queries of a step attend with expanded keys and values, where the engine's user chose that.

Absorbed attention multiplies every entry with L + R values of a query and adds L; expanded, with A + R, and V. What
that saves a pair of query and entry is paid for by expanding: each entry's L values become A + V of every head. Both
are counted in multiplications, which come with as many additions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...kernels.protocol import Chunk, PagedBatch
from .config import ModelConfig

PromptAttention = Literal["absorbed", "expanded"]
PROMPT_ATTENTIONS: tuple[PromptAttention, ...] = ("absorbed", "expanded")


def least_expanded_rows(config: ModelConfig) -> int:
    """From so many queries of a sequence in a step on, expanding its context takes fewer operations, however long that
    is. Raises ValueError for a model whose absorbed attention never takes more.

    Of a head, C entries behind which n queries stand: expanding them takes C * L * (A + V), and saves n * L * (A + V),
    for the queries are not absorbed nor their results projected, and 2L - A - V a pair, of which there are at least
    n * (C - n). So n * (C - n) * (2L - A - V) >= (C - n) * L * (A + V) decides, and C - n falls out: 171 queries at
    Kimi-K2.5's 512, 128 and 128. Behind no prefix expanding saves operations from the first query on, but not launches.
    """
    expanded = config.qk_nope_head_dim + config.v_head_dim
    saved = 2 * config.kv_lora_rank - expanded
    if saved <= 0:
        raise ValueError(
            f"prompt_attention: 'expanded' saves nothing where kv_lora_rank is {config.kv_lora_rank} and a head's key "
            f"and value together have {expanded} values without rotation; 'absorbed' is right for this model"
        )
    return -(-config.kv_lora_rank * expanded // saved)


def long_chunks(batch: PagedBatch, least: int) -> tuple[Chunk, ...]:
    """The chunks of at least so many rows."""
    return tuple(chunk for chunk in batch.chunks if chunk.rows >= least)


@dataclass(frozen=True)
class Others:
    """Neighbouring sequences of a step: its rows `rows`, as a batch of their own."""

    rows: slice
    batch: PagedBatch


def others(batch: PagedBatch, chunks: Sequence[Chunk]) -> Iterator[Others]:
    """What is left of a batch without these of its chunks, which are in order."""
    sequence = row = 0
    for chunk in (*chunks, Chunk(len(batch.context_len), len(batch.positions), 0, 0)):
        if row < chunk.first:
            rows, sequences = slice(row, chunk.first), slice(sequence, chunk.sequence)
            starts = batch.query_start[sequence : chunk.sequence + 1] - row
            part = replace(
                batch,
                query_start=starts,
                context_len=batch.context_len[sequences],
                page_table=batch.page_table[sequences],
                positions=batch.positions[rows],
                slots=batch.slots[rows],
                chunks=(),
            )
            yield Others(rows, part)
        sequence, row = chunk.sequence + 1, chunk.first + chunk.rows
