from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import normal
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flyray.kernels.protocol import Kernels, LogitChanges, Sampled, SamplingRow
from flyray.kernels.sampling import sample, splitmix64, uniform

GREEDY = SamplingRow(0.0, 1.0, 0, 0, 0)


def draws(
    logits: list[float], count: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> list[int]:
    rows = [SamplingRow(temperature, top_p, top_k, 11, position, min_p) for position in range(count)]
    return sample(torch.tensor([logits]).expand(count, -1), rows).tokens.tolist()


def test_splitmix64_matches_published_values() -> None:
    """The first outputs for seed 1234567, from the generator's reference implementation."""
    golden, state, outputs = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        outputs.append(splitmix64(state))
        state = (state + golden) & (2**64 - 1)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(), st.integers(0, 2**40))
def test_uniform_is_a_function_into_the_unit_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0
    assert uniform(seed, position) == uniform(seed, position)


def test_uniform_is_uniform_over_positions_and_seeds() -> None:
    for numbers in ([uniform(3, p) for p in range(4000)], [uniform(s, 17) for s in range(4000)]):
        counts = torch.histc(torch.tensor(numbers, dtype=torch.float64), 20, 0.0, 1.0)
        assert float(((counts - 200) ** 2 / 200).sum()) < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001


def test_greedy_takes_the_lowest_of_equals(kernels: Kernels) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [-torch.inf, -5.0, -torch.inf]])
    assert kernels.sample(logits, [GREEDY, GREEDY]).tokens.tolist() == [1, 1]
    assert kernels.sample(logits[:0], []).tokens.tolist() == []


def test_frequencies_follow_the_softmax() -> None:
    logits, temperature, count = [1.0, 0.0, 2.0, -1.0, 0.5], 0.7, 4000
    wanted = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0) * count
    seen = torch.bincount(torch.tensor(draws(logits, count, temperature)), minlength=5)
    assert float(((seen - wanted) ** 2 / wanted).sum()) < 18.5  # 4 degrees of freedom, p = 0.001


def test_top_k_keeps_the_best_and_ties_go_to_lower_ids() -> None:
    assert set(draws([0.0, 1.0, 1.0, 1.0, -1.0], 300, top_k=2)) == {1, 2}
    assert set(draws([0.0, 1.0], 300, top_k=9)) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = [math.log(p) for p in (0.1, 0.5, 0.15, 0.25)]
    assert set(draws(logits, 300, top_p=0.49)) == {1}
    assert set(draws(logits, 300, top_p=0.51)) == {1, 3}
    assert set(draws(logits, 500, top_p=0.76)) == {1, 2, 3}
    assert set(draws(logits, 500, top_p=1.0)) == {0, 1, 2, 3}


def test_top_p_is_taken_of_what_top_k_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # Of the best two, 0.4 is 4/7: 0.57 is within it, 0.58 is not.
    assert set(draws(logits, 300, top_k=2, top_p=0.57)) == {0}
    assert set(draws(logits, 300, top_k=2, top_p=0.58)) == {0, 1}


def test_forbidden_tokens_are_never_drawn() -> None:
    assert set(draws([0.0, -math.inf, 0.0], 300)) == {0, 2}


def mixed_rows() -> list[SamplingRow]:
    rows = [SamplingRow((i % 3) * 0.5, 0.9, i % 4 * 10, i, 5 * i, i % 2 * 0.02, i % 6) for i in range(20)]
    ids, numbers = torch.tensor([3, 7, 200]), torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    changes = LogitChanges(ids[:2], numbers[:2], ids, numbers, ids[2:], 1.3, 0.5, -0.25)
    return [dataclasses.replace(row, changes=changes) if i % 5 == 0 else row for i, row in enumerate(rows)]


def test_a_row_does_not_depend_on_the_others(kernels: Kernels) -> None:
    logits, rows = normal(1, 20, 300), mixed_rows()
    together = kernels.sample(logits, rows)
    for i, row in enumerate(rows):
        alone = kernels.sample(logits[i : i + 1], [row])
        assert int(alone.tokens) == int(together.tokens[i])
        assert float(alone.logprobs) == float(together.logprobs[i])
        assert alone.top_tokens.shape == alone.top_logprobs.shape == (1, row.top_logprobs)
        assert torch.equal(alone.top_tokens[0], together.top_tokens[i, : row.top_logprobs])
        assert torch.equal(alone.top_logprobs[0], together.top_logprobs[i, : row.top_logprobs])


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 300, 5000])
def test_backends_sample_the_same_to_the_bit(kernels: Kernels, vocabulary: int) -> None:
    logits = (normal(vocabulary, 20, vocabulary) * 4).round(decimals=1)  # so that there are ties
    rows = [dataclasses.replace(row, changes=None) for row in mixed_rows()]
    assert_same(kernels.sample(logits, rows), sample(logits, rows))


def assert_same(left: Sampled, right: Sampled) -> None:
    for field in dataclasses.fields(Sampled):
        assert torch.equal(getattr(left, field.name), getattr(right, field.name)), field.name


def test_log_probabilities_are_those_of_the_softmax(kernels: Kernels) -> None:
    logits = normal(5, 20, 3000) * 3
    logits[:, 5] = -torch.inf
    found = kernels.sample(logits, mixed_rows())
    wanted = logits.to(torch.float64).log_softmax(dim=1)
    torch.testing.assert_close(
        found.logprobs.double(), wanted.gather(1, found.tokens[:, None])[:, 0], atol=2e-6, rtol=0
    )
    best = wanted.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.top_tokens, best.indices[:, :5])
    torch.testing.assert_close(found.top_logprobs.double(), best.values[:, :5], atol=2e-6, rtol=0)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.3, 2.0), st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.integers(0, 12))
def test_what_is_kept_is_what_transformers_keep(seed: int, temperature: float, min_p: float, top_k: int) -> None:
    """min-p, then top-k, then top-p, on float64 logits; their warpers are the oracle."""
    logits, top_p = normal(seed, 1, 40) * 2, (seed % 100 + 1) / 101
    scores = logits.to(torch.float64) / float(torch.tensor(temperature, dtype=torch.float32))
    for warper in (
        *([MinPLogitsWarper(min_p)] if min_p else []),
        *([TopKLogitsWarper(top_k)] if top_k else []),
        TopPLogitsWarper(top_p),
    ):
        scores = warper(torch.empty(1, 0), scores)
    rows = [SamplingRow(temperature, top_p, top_k, seed, position, min_p) for position in range(60)]
    drawn = set(sample(logits.expand(60, -1), rows).tokens.tolist())
    assert drawn <= set((scores[0] > -torch.inf).nonzero()[:, 0].tolist())


def test_min_p_keeps_what_is_probable_enough() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert set(draws(logits, 300, min_p=0.51)) == {0, 1}
    assert set(draws(logits, 300, min_p=0.49)) == {0, 1, 2}
    assert set(draws(logits, 300, temperature=2.0, min_p=0.51)) == {0, 1, 2}  # sqrt(0.2 / 0.4) is 0.71, of 0.1 0.5
    assert set(draws(logits, 300, min_p=1.0)) == {0}
    assert set(draws(logits, 300, min_p=0.49, top_p=0.75)) == {0, 1}  # of the 0.9 that min-p leaves, 0.675


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (SamplingRow(-0.1, 1.0, 0, 0, 0), "temperature"),
        (SamplingRow(math.nan, 1.0, 0, 0, 0), "temperature"),
        (SamplingRow(1.0, 0.0, 0, 0, 0), "top_p"),
        (SamplingRow(1.0, 1.1, 0, 0, 0), "top_p"),
        (SamplingRow(1.0, 1.0, -1, 0, 0), "top_k"),
        (SamplingRow(1.0, 1.0, 0, 0, -1), "position"),
        (SamplingRow(1.0, 1.0, 0, 0, 0, 1.5), "min_p"),
        (SamplingRow(1.0, 1.0, 0, 0, 0, math.nan), "min_p"),
        (SamplingRow(1.0, 1.0, 0, 0, 0, 0.0, 21), "top_logprobs"),
    ],
)
def test_refuses_values_out_of_range(row: SamplingRow, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        sample(torch.zeros(1, 4), [row])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_logits_that_are_no_numbers(bad: float) -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="logits row 1"):
        sample(logits, [GREEDY, GREEDY])


def test_refuses_another_number_of_rows() -> None:
    with pytest.raises(ValueError, match="logits"):
        sample(torch.zeros(2, 4), [GREEDY])
