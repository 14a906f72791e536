"""Kept distributions: rows that come back, divergences against NumPy in float64, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.distributions import (
    DistributionError,
    KeptDistributions,
    SliceDistributions,
    compare,
    log_distributions,
)
from flyray.actors.step_batch import Scored

VOCAB = 37


def logits(rows: int, seed: int, spread: float = 4.0) -> torch.Tensor:
    return spread * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def oracle(kept: torch.Tensor, found: torch.Tensor) -> np.ndarray:
    """KL(kept ‖ found) of logits, in float64 throughout."""
    p, q = (values.numpy().astype(np.float64) for values in (kept, found))
    p, q = (values - values.max(-1, keepdims=True) for values in (p, q))
    log_p, log_q = (values - np.log(np.exp(values).sum(-1, keepdims=True)) for values in (p, q))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


@given(seed=st.integers(0, 99), spread=st.floats(0.01, 30.0))
def test_divergences_are_those_of_float64(seed: int, spread: float) -> None:
    kept = logits(5, seed, spread)
    found = kept + 0.1 * logits(5, seed + 100, spread)
    result = compare(log_distributions(kept), log_distributions(found))
    np.testing.assert_allclose(result.divergences, oracle(kept, found), rtol=1e-5, atol=1e-7)
    assert result.agreements == tuple((kept.argmax(-1) == found.argmax(-1)).tolist())
    same = compare(log_distributions(kept), log_distributions(kept.clone()))
    assert same.divergences == (0.0,) * 5
    assert same.agreements == (True,) * 5


@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5), inner=st.integers(1, 4))
def test_a_prompt_may_be_cut_in_any_way(cuts: list[int], inner: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("kept") / "prompt"
    rows = sum(cuts)
    before, after = logits(rows, 1), logits(rows, 2)
    first = 0
    for number, count in enumerate(cuts):
        last = number == len(cuts) - 1
        keeping = SliceDistributions(Scored(1, first, 0, (0,) * count, str(path), "", last), VOCAB)
        for begin in range(first, first + count, inner):
            keeping.take(before[begin : min(begin + inner, first + count)])
        keeping.end()
        assert keeping.error == ""
        first += count
    raw = np.fromfile(path, "<f4").reshape(rows, VOCAB)
    np.testing.assert_array_equal(raw, before.double().log_softmax(-1).float().numpy())
    comparing = SliceDistributions(Scored(1, 0, 0, (0,) * rows, "", str(path), True), VOCAB)
    comparing.take(after)
    comparing.end()
    whole = compare(log_distributions(before), log_distributions(after))
    assert (comparing.error, tuple(comparing.divergences)) == ("", whole.divergences)
    assert tuple(comparing.agreements) == whole.agreements


def test_a_prompt_of_one_token_has_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.write_bytes(b"of an earlier prompt")
    for keep, other in ((str(path), ""), ("", str(path))):
        slice_ = SliceDistributions(Scored(1, 0, 0, (), keep, other, True), VOCAB)
        slice_.end()
        assert slice_.error == ""
    assert path.read_bytes() == b""


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    kept = KeptDistributions(str(path), VOCAB)
    with pytest.raises(DistributionError, match=f"{path}: kept distributions cannot be read: No such file"):
        kept.read(0, 2)
    with pytest.raises(DistributionError, match=f"{path}: kept distributions cannot be read: No such file"):
        kept.check_end(0)
    kept.write(0, log_distributions(logits(3, 0)))
    with pytest.raises(DistributionError, match="holds 444 bytes of kept distributions, at least 592 are needed for 4"):
        kept.read(2, 2)
    with pytest.raises(
        DistributionError, match="holds 444 bytes of kept distributions, 296 are needed for 2 positions"
    ):
        kept.check_end(2)
    kept.check_end(3)
    kept.write(0, log_distributions(logits(1, 0)))  # a new prompt begins the file anew
    assert path.stat().st_size == 4 * VOCAB
    for wrong in (tmp_path, tmp_path / "kept" / "below"):
        with pytest.raises(DistributionError, match=f"{wrong}: distributions cannot be kept: "):
            KeptDistributions(str(wrong), VOCAB).write(0, log_distributions(logits(1, 0)))


def test_after_an_error_nothing_more_is_done(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    KeptDistributions(str(path), VOCAB).write(0, log_distributions(logits(2, 0)))
    slice_ = SliceDistributions(Scored(1, 0, 0, (0,) * 6, "", str(path), True), VOCAB)
    for begin in range(0, 6, 2):
        slice_.take(logits(6, 0)[begin : begin + 2])
    slice_.end()
    assert slice_.error.startswith(f"{path}: holds 296 bytes")
    assert (slice_.divergences, slice_.agreements) == ([], [])
