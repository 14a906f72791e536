"""Pairs by shard, against a plain account."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.engine_config import expert_ranges
from flyray.actors.pair_split import split_pairs


@given(
    experts=st.integers(1, 30),
    shards=st.integers(1, 8),
    tokens=st.integers(0, 9),
    slots=st.integers(1, 4),
    data=st.data(),
)
def test_every_pair_goes_to_its_experts_shard_with_its_row(
    experts: int, shards: int, tokens: int, slots: int, data: st.DataObject
) -> None:
    ranges = expert_ranges(experts, min(shards, experts))
    count = tokens * slots
    chosen = data.draw(st.lists(st.integers(0, experts - 1), min_size=count, max_size=count))
    ids = np.array(chosen, np.int32).reshape(tokens, slots)
    parts = split_pairs(ids, np.array([held.start for held in ranges], np.int32))
    assert len(parts) == len(ranges)
    for held, part in zip(ranges, parts, strict=True):
        mine = [place for place, expert in enumerate(chosen) if expert in held]
        assert part.positions.tolist() == mine
        assert part.tokens.tolist() == sorted({place // slots for place in mine})
        assert [part.tokens[row] for row in part.pair_row] == [place // slots for place in mine]
        assert (part.pair_expert + held.start).tolist() == [chosen[place] for place in mine]
        assert part.pair_row.dtype == part.pair_expert.dtype == np.int32
