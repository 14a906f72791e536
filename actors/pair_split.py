"""Which (token, slot) pairs go to which shard."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class ShardPairs:
    """What one shard runs of a dispatch, R rows and P pairs.

    positions: [P] int64, token * K + slot of each pair, ascending. tokens: [R] int64, the tokens to send, ascending.
    pair_row: [P] int32, which of them each pair reads. pair_expert: [P] int32, the shard's own expert numbers.
    """

    positions: np.ndarray
    tokens: np.ndarray
    pair_row: np.ndarray
    pair_expert: np.ndarray


def split_pairs(ids: np.ndarray, first_experts: np.ndarray) -> list[ShardPairs]:
    """ids [T, K] int32, first_experts [shards] int32 ascending from 0: the first expert of each shard.

    One pass over all pairs, sorted by shard; what the shards get are slices of it.
    """
    chosen = ids.reshape(-1)
    owner = np.searchsorted(first_experts, chosen, side="right") - 1
    positions = owner.astype(np.int16).argsort(kind="stable")  # 16 bits: sorted by radix, in one pass
    owner = owner[positions]
    tokens = positions // ids.shape[1]
    is_first = np.ones(len(tokens), np.bool_)
    is_first[1:] = (tokens[1:] != tokens[:-1]) | (owner[1:] != owner[:-1])
    row = is_first.cumsum(dtype=np.int32)
    row -= 1
    expert = chosen[positions] - first_experts[owner]
    tokens = tokens[is_first]
    bounds = owner.searchsorted(np.arange(len(first_experts) + 1)).tolist()
    parts = []
    for begin, end in pairwise(bounds):
        first, last = (row[begin], row[end - 1] + 1) if end > begin else (0, 0)
        parts.append(ShardPairs(positions[begin:end], tokens[first:last], row[begin:end] - first, expert[begin:end]))
    return parts
