"""What a shard knows of a sequence when it draws: the same after a preemption as without one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.sequence_sampler import SequenceSampler
from flyray.actors.step_plan import Sampling, SequenceStart
from flyray.kernels.protocol import LogitChanges, SamplingRow

PLAIN = Sampling(0.7, 0.9, 40, 7, min_p=0.1, top_logprobs=3)
PENALIZED = dataclasses.replace(PLAIN, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.2)
TOKENS = st.lists(st.integers(0, 9), max_size=40)


def sampler(how: Sampling, prompt: Sequence[int] = (), generated: Sequence[int] = ()) -> SequenceSampler:
    history = (*prompt, *generated) if how.penalizes else ()
    return SequenceSampler(SequenceStart(1, how, False, generated=len(generated), history=history))


def changes_of(row: SamplingRow) -> LogitChanges:
    assert row.changes is not None
    return row.changes


@given(TOKENS, TOKENS, st.data())
def test_counts_go_on_after_a_preemption(prompt: list[int], answer: list[int], data: st.DataObject) -> None:
    begun = data.draw(st.integers(0, len(answer)))
    how = sampler(PENALIZED, prompt, answer[:begun])
    for token in answer[begun:]:
        how.took(token)
    change = changes_of(how.row(5))
    assert Counter(dict(zip(change.seen.tolist(), change.counts.tolist(), strict=True))) == Counter(
        dict.fromkeys(prompt, 0) | Counter(answer)
    )
    assert (change.presence_penalty, change.frequency_penalty, change.repetition_penalty) == (0.5, 0.25, 1.2)


def test_a_plain_sequence_keeps_nothing() -> None:
    how = sampler(PLAIN)
    how.took(5)
    assert how.row(17) == SamplingRow(0.7, 0.9, 40, 7, 17, 0.1, 3, None)
    assert not PLAIN.penalizes
    assert all(
        dataclasses.replace(PLAIN, **{name: 0.1}).penalizes
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")
    )


def test_stop_tokens_are_banned_for_the_first_tokens_also_after_a_preemption() -> None:
    banning = dataclasses.replace(PLAIN, min_tokens=3, stop_ban=(4, 6))
    how, again = sampler(banning), sampler(banning, generated=[1, 2])
    for number in range(3):
        assert changes_of(how.row(number)).banned.tolist() == [4, 6]
        how.took(1)
    assert how.row(3).changes is None
    assert changes_of(again.row(2)).banned.tolist() == [4, 6]
    again.took(3)
    assert again.row(3).changes is None


def test_a_bias_stays() -> None:
    biased = dataclasses.replace(PLAIN, logit_bias=((3, -100.0), (5, 2.5)), min_tokens=1, stop_ban=(4,))
    how = sampler(biased)
    how.took(1)
    change = changes_of(how.row(1))
    assert (change.bias_tokens.tolist(), change.bias.tolist()) == ([3, 5], [-100.0, 2.5])
    assert not change.banned.numel()
    assert change.bias.dtype is torch.float64
