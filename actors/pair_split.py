"""Which (token, slot) pairs go to which shard."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class ShardPairs:
    """What one shard runs of a dispatch, R rows and P pairs.

    positions: [P] int64, token * K + slot of each pair, ascending. tokens: [R] int64, the tokens to send, ascending.
    pair_row: [P] int32, which of them each pair reads. pair_expert: [P] int32, the shard's own slots.
    """

    positions: np.ndarray
    tokens: np.ndarray
    pair_row: np.ndarray
    pair_expert: np.ndarray


def split_pairs(slots: np.ndarray, first_slots: np.ndarray) -> list[ShardPairs]:
    """slots [T, K] int32, numbers of all shards' slots; first_slots [shards] int32 ascending from 0: of each shard.

    One pass over all pairs, sorted by shard; what the shards get are slices of it.
    """
    chosen = slots.reshape(-1)
    owner = np.searchsorted(first_slots, chosen, side="right") - 1
    positions = owner.astype(np.int16).argsort(kind="stable")  # 16 bits: sorted by radix, in one pass
    owner = owner[positions]
    tokens = positions // slots.shape[1]
    is_first = np.ones(len(tokens), np.bool_)
    is_first[1:] = (tokens[1:] != tokens[:-1]) | (owner[1:] != owner[:-1])
    row = is_first.cumsum(dtype=np.int32)
    row -= 1
    expert = chosen[positions] - first_slots[owner]
    tokens = tokens[is_first]
    bounds = owner.searchsorted(np.arange(len(first_slots) + 1)).tolist()
    parts = []
    for begin, end in pairwise(bounds):
        first, last = (row[begin], row[end - 1] + 1) if end > begin else (0, 0)
        parts.append(ShardPairs(positions[begin:end], tokens[first:last], row[begin:end] - first, expert[begin:end]))
    return parts
