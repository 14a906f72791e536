"""What a load test says of its streams, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.bench.load_summary import PERCENTILES, Limits, LoadSummary, PrefixReuse, Spread, StreamTimes

SECONDS = st.floats(0, 1000)
BEGIN, END = 100.0, 600.0


@st.composite
def streams(draw) -> StreamTimes:
    """A stream of any pieces, each of one or more tokens; now and then one that failed."""
    sent = draw(SECONDS)
    if draw(st.integers(0, 9)) == 0:
        return StreamTimes(sent, error=draw(st.sampled_from(["503", "429: queue_full"])))
    gaps = draw(st.lists(st.floats(0, 50), min_size=1, max_size=20))
    arrivals = tuple(float(sent + passed) for passed in np.cumsum(gaps))
    return StreamTimes(sent, arrivals, len(arrivals) + draw(st.integers(0, 5)), 7)


def assert_spread(spread: Spread, values: np.ndarray) -> None:
    if not len(values):
        assert np.isnan([spread.mean, spread.p50, spread.p90, spread.p99]).all()
        return
    np.testing.assert_allclose(spread.mean, values.mean(), rtol=1e-9, atol=1e-12)
    found = [getattr(spread, f"p{percent}") for percent in PERCENTILES]
    np.testing.assert_allclose(found, np.percentile(values, PERCENTILES), rtol=1e-9, atol=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_percentiles_are_numpys(values):
    assert_spread(Spread.of(values), np.array(values))


@given(
    st.lists(streams(), max_size=20),
    st.none() | st.floats(0, 100),
    st.none() | st.floats(0, 20),
)
def test_a_summary_is_what_numpy_makes_of_the_streams(made, ttft, tpot):
    found = LoadSummary.of(made, BEGIN, END, Limits(ttft, tpot))
    whole = [stream for stream in made if not stream.error]
    sent = np.array([stream.sent for stream in whole])
    first = np.array([stream.arrivals[0] for stream in whole])
    last = np.array([stream.arrivals[-1] for stream in whole])
    tokens = np.array([stream.tokens for stream in whole])
    rest = np.where(tokens > 1, (last - first) / np.maximum(tokens - 1, 1), np.nan) if whole else np.array([])
    assert found.requests == len(whole)
    assert sum(found.errors.values()) == len(made) - len(whole)
    assert_spread(found.ttft, first - sent)
    assert_spread(found.latency, last - sent)
    assert_spread(found.tpot, rest[~np.isnan(rest)])
    assert_spread(found.itl, np.concatenate([np.diff(stream.arrivals) for stream in whole] or [np.array([])]))
    inside = [np.mean([BEGIN <= arrival < END for arrival in stream.arrivals]) for stream in whole]
    np.testing.assert_allclose(found.tokens_per_second, np.dot(tokens, inside) / (END - BEGIN) if whole else 0)
    ended = (last >= BEGIN) & (last < END)
    np.testing.assert_allclose(found.requests_per_second, ended.sum() / (END - BEGIN))
    good = ended & (first - sent <= (np.inf if ttft is None else ttft))
    good &= np.isnan(rest) | (rest <= (np.inf if tpot is None else tpot))
    np.testing.assert_allclose(found.goodput, good.sum() / (END - BEGIN))


def test_an_empty_time_is_refused():
    with pytest.raises(ValueError, match="is empty"):
        LoadSummary.of([], 1.0, 1.0, Limits())


def test_a_prefix_that_is_computed_once_a_run_is_the_least() -> None:
    def request(sent: float, ttft: float, cached: int) -> StreamTimes:
        return StreamTimes(sent, (sent + ttft, sent + ttft + 1), 2, 110, cached)

    first, second = request(1, 0.5, 0), request(2, 0.25, 100)
    found = PrefixReuse.of([[second, first], [StreamTimes(0, error="503")]], 100)
    assert found == PrefixReuse(first=0.5, later=0.25, cached_share=100 / 220, computed=1.0)
    twice = PrefixReuse.of([[first, second], [first, request(3, 0.5, 0)]], 100)
    assert twice.computed == (440 - 100) / (2 * 110 + 2 * 10)
    assert np.isnan(PrefixReuse.of([[first]], 100).later)
