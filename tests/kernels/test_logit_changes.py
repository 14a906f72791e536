"""Bias, penalties, bans and masks against transformers' processors, OpenAI's formula in NumPy, and in a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import normal
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers import SequenceBiasLogitsProcessor as BiasProcessor

from flyray.kernels.logit_changes import changed_logits
from flyray.kernels.protocol import Kernels, LogitChanges, SamplingRow

VOCAB = 40
GREEDY = SamplingRow(0.0, 1.0, 0, 0, 0)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=30)


def changes(
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    bias: Mapping[int, float] | None = None,
    banned: tuple[int, ...] = (),
) -> LogitChanges:
    """Without penalties."""
    seen = sorted({*prompt, *generated})
    return LogitChanges(
        torch.tensor([*(bias or {})], dtype=torch.int64),
        torch.tensor([*(bias or {}).values()], dtype=torch.float64),
        torch.tensor(seen, dtype=torch.int64),
        torch.tensor([generated.count(token) for token in seen], dtype=torch.float64),
        torch.tensor(banned, dtype=torch.int64),
    )


def changed(logits: torch.Tensor, change: LogitChanges) -> torch.Tensor:
    return changed_logits(logits, [dataclasses.replace(GREEDY, changes=change)])


@given(TOKENS, TOKENS, st.floats(0.1, 5.0), st.integers(0, 99))
def test_repetition_is_as_in_transformers(prompt: list[int], answer: list[int], penalty: float, seed: int) -> None:
    logits = normal(seed, 1, VOCAB)
    found = changed(logits, dataclasses.replace(changes(prompt, answer), repetition_penalty=penalty))
    ids = torch.tensor([[*prompt, *answer]], dtype=torch.int64)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.to(torch.float64))
    assert torch.equal(found, wanted.to(torch.float32))


@given(TOKENS, TOKENS, st.floats(-2.0, 2.0), st.floats(-2.0, 2.0), st.integers(0, 99))
def test_presence_and_frequency_are_openais(
    prompt: list[int], answer: list[int], presence: float, frequency: float, seed: int
) -> None:
    logits = normal(seed, 1, VOCAB)
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency}
    found = changed(logits, dataclasses.replace(changes(prompt, answer), **penalties))
    count = np.bincount(np.array(answer, dtype=np.int64), minlength=VOCAB)
    wanted = logits.numpy().astype(np.float64) - (count * frequency + (count > 0) * presence)
    np.testing.assert_array_equal(found.numpy(), wanted.astype(np.float32))


@given(st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), min_size=1, max_size=8), st.integers(0, 99))
def test_bias_and_bans_are_as_in_transformers(bias: dict[int, float], seed: int) -> None:
    logits = normal(seed, 1, VOCAB)
    logits[0, seed % VOCAB] = -torch.inf
    banned = (3, 7)
    ids = torch.zeros(1, 5, dtype=torch.int64)
    wanted = BiasProcessor([[[token], value] for token, value in bias.items()])(ids, logits.to(torch.float64))
    wanted = MinNewTokensLengthLogitsProcessor(5, 3, [*banned], device="cpu")(ids, wanted)
    found = changed(logits, changes(bias=bias, banned=banned))
    torch.testing.assert_close(found, wanted.to(torch.float32), atol=1e-5, rtol=0)
    assert math.isinf(found[0, seed % VOCAB])


def test_bias_comes_before_penalties_and_bans_after_all() -> None:
    """vLLM's order: a logit of -1 biased to 3 is divided, not multiplied."""
    change = changes(prompt=[0], generated=[1, 1], bias={0: 4.0, 2: 9.0}, banned=(2,))
    change = dataclasses.replace(change, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    found = changed(torch.tensor([[-1.0, -1.0, 0.0, 5.0]]), change)
    assert found.tolist() == [[1.5, -2.0 - 0.5 - 0.5, -math.inf, 5.0]]


@given(st.sets(st.integers(0, VOCAB - 1), min_size=1), st.integers(0, 99))
def test_a_mask_leaves_what_it_allows_as_it_is(allowed: set[int], seed: int) -> None:
    words = np.zeros(2, np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1) << np.uint32(token % 32)
    logits = normal(seed, 3, VOCAB)
    change = dataclasses.replace(changes(bias={5: 2.0}), allowed=torch.from_numpy(words.view(np.int32)))
    plain = changed(logits[1:2], dataclasses.replace(change, allowed=None))[0]
    found = changed_logits(logits, [GREEDY, dataclasses.replace(GREEDY, changes=change), GREEDY])
    wanted = [float(plain[token]) if token in allowed else -math.inf for token in range(VOCAB)]
    assert found[1].tolist() == wanted
    assert torch.equal(found[::2], logits[::2])


@pytest.mark.parametrize("penalty", [5e-324, 1e-30, 1e30, 1.7e308])
def test_no_penalty_makes_an_infinite_logit(penalty: float) -> None:
    change = dataclasses.replace(changes(prompt=[0, 1, 2]), repetition_penalty=penalty)
    found = changed(torch.tensor([[3e38, -3e38, 0.0, -1.0]]), change)
    assert found.isfinite().all()


def test_rows_without_changes_and_inputs_stay_as_they_are(kernels: Kernels) -> None:
    logits = normal(1, 3, VOCAB)
    before = logits.clone()
    assert changed_logits(logits, [GREEDY] * 3) is logits
    change = changes(bias={5: 100.0})
    rows = [GREEDY, dataclasses.replace(GREEDY, changes=change), GREEDY]
    sampled = kernels.sample(logits, rows)
    assert torch.equal(logits, before)
    assert sampled.tokens.tolist() == [int(logits[0].argmax()), 5, int(logits[2].argmax())]
    torch.testing.assert_close(sampled.logprobs[1], logits.log_softmax(1)[1, 5], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changes(bias={VOCAB: 1.0}), "changes.bias of row 0 names a token outside the vocabulary of 40"),
        (changes(prompt=[VOCAB]), "changes.seen of row 0"),
        (changes(banned=(-1,)), "changes.banned of row 0"),
        (
            dataclasses.replace(changes(), allowed=torch.ones(1, dtype=torch.int32)),
            "changes.allowed of row 0 covers 32 tokens, expected 40",
        ),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(change: LogitChanges, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        changed(normal(1, 1, VOCAB), change)


def test_a_row_with_every_token_banned_is_refused(kernels: Kernels) -> None:
    row = dataclasses.replace(GREEDY, changes=changes(banned=tuple(range(VOCAB))))
    with pytest.raises(ValueError, match="largest of logits row 0 is -inf"):
        kernels.sample(normal(1, 1, VOCAB), [row])
