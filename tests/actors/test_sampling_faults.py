"""Values that would make a shard fail are refused by the scheduler, by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from flyray.actors.sampling_faults import sampling_faults
from flyray.actors.step_plan import Sampling

VOCAB = 9
GREEDY = Sampling(0.0, 1.0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": math.inf}, "sampling.temperature: inf is not a finite number"),
        ({"min_p": 1.01}, "sampling.min_p: 1.01 is not from 0 to 1"),
        ({"min_p": math.nan}, "sampling.min_p: nan is not from 0 to 1"),
        ({"presence_penalty": -2.5}, "sampling.presence_penalty: -2.5 is not from -2 to 2"),
        ({"frequency_penalty": math.nan}, "sampling.frequency_penalty: nan is not from -2 to 2"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty: 0.0 is not a finite number above 0"),
        ({"repetition_penalty": math.inf}, "sampling.repetition_penalty: inf is not a finite number above 0"),
        ({"min_tokens": -1}, "sampling.min_tokens: -1 is below 0"),
        ({"top_logprobs": 21}, "sampling.top_logprobs: 21 is not from 0 to 20"),
        ({"logit_bias": ((9, 1.0),)}, "sampling.logit_bias: token 9 is outside the vocabulary of 9 tokens"),
        ({"logit_bias": ((1, 101.0),)}, "sampling.logit_bias: 101.0 for token 1 is not from -100 to 100"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "sampling.logit_bias: names a token twice"),
        (
            {"logit_bias": tuple((i % 9, 1.0) for i in range(1025))},
            "sampling.logit_bias: names 1025 tokens, at most",
        ),
        ({"stop_ban": (9,)}, "sampling.stop_ban: token 9 is outside"),
        ({"stop_ban": tuple(range(9))}, "sampling.stop_ban: bans all 9 tokens"),
    ],
)
def test_each_value_out_of_range_is_named(changes: dict[str, Any], says: str) -> None:
    assert next(sampling_faults(dataclasses.replace(GREEDY, **changes), VOCAB)).startswith(says)


def test_the_ends_of_the_ranges_are_taken() -> None:
    low = Sampling(0.0, 1e-9, 0, 0, 0.0, -2.0, -2.0, 1e-9, ((0, -100.0),), 0, (), 0)
    high = Sampling(2.0, 1.0, 9, 1, 1.0, 2.0, 2.0, 1e9, ((8, 100.0),), 99, tuple(range(8)), 20)
    assert not [*sampling_faults(low, VOCAB), *sampling_faults(high, VOCAB)]
