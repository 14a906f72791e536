"""What a load test measured: the times of each stream, and their summary over all streams of a level."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class StreamTimes:
    """One request as its client saw it; times in seconds of one clock.

    arrivals: when each piece of the answer came. tokens: of the whole answer. cached_tokens: of the prompt, from the
    prefix cache. error: empty, or why there is no whole answer; then nothing else but `sent` counts.
    """

    sent: float
    arrivals: tuple[float, ...] = ()
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def latency(self) -> float:
        """Time to the last token."""
        return self.arrivals[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean time of a token after the first; None for an answer of one token."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Times between pieces. A piece of a server that is behind may hold several tokens."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def tokens_between(self, begin: float, end: float) -> float:
        """The tokens that came in a time: pieces of a stream count alike."""
        if not self.arrivals:
            return 0.0
        inside = sum(begin <= arrival < end for arrival in self.arrivals)
        return self.tokens * inside / len(self.arrivals)


@dataclass(frozen=True)
class Limits:
    """What a good answer keeps to, in seconds; None: any time is good."""

    ttft: float | None = None
    tpot: float | None = None

    def keeps(self, stream: StreamTimes) -> bool:
        """Whether the answer came whole and in time."""
        if stream.error:
            return False
        good_first = self.ttft is None or stream.ttft <= self.ttft
        return good_first and (self.tpot is None or stream.tpot is None or stream.tpot <= self.tpot)


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of some times, in seconds; all NaN when there are none."""

    mean: float
    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Percentiles by linear interpolation between order statistics, NumPy's default."""
        ordered = sorted(values)
        if not ordered:
            return Spread(*[math.nan] * 4)
        return Spread(math.fsum(ordered) / len(ordered), *(_percentile(ordered, percent) for percent in PERCENTILES))


@dataclass(frozen=True)
class LoadSummary:
    """A level of load over the time [begin, end): rates of what came in that time, spreads of all whole answers.

    errors: how many requests ended without an answer, by reason. goodput: whole answers a second within the limits.
    """

    seconds: float
    requests: int
    errors: dict[str, int]
    tokens_per_second: float
    requests_per_second: float
    goodput: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    latency: Spread

    @staticmethod
    def of(streams: Sequence[StreamTimes], begin: float, end: float, limits: Limits) -> LoadSummary:
        """Raises ValueError when the time is empty."""
        if end <= begin:
            raise ValueError(f"the time from {begin} to {end} is empty")
        seconds = end - begin
        whole = [stream for stream in streams if not stream.error]
        ended = [stream for stream in whole if begin <= stream.arrivals[-1] < end]
        errors: dict[str, int] = {}
        for stream in streams:
            if stream.error:
                errors[stream.error] = errors.get(stream.error, 0) + 1
        return LoadSummary(
            seconds=seconds,
            requests=len(whole),
            errors=errors,
            tokens_per_second=math.fsum(stream.tokens_between(begin, end) for stream in whole) / seconds,
            requests_per_second=len(ended) / seconds,
            goodput=sum(limits.keeps(stream) for stream in ended) / seconds,
            ttft=Spread.of(stream.ttft for stream in whole),
            tpot=Spread.of(stream.tpot for stream in whole if stream.tpot is not None),
            itl=Spread.of(gap for stream in whole for gap in stream.itl),
            latency=Spread.of(stream.latency for stream in whole),
        )


@dataclass(frozen=True)
class PrefixReuse:
    """What requests that begin alike gained, all runs together. Times in seconds to the first token, medians.

    first: of each run's first request, later: of the others; NaN if there are none. computed: prompt tokens that were
    not in the cache, over the least there can be: one prefix a run and the rest of every prompt.
    """

    first: float
    later: float
    cached_share: float
    computed: float

    @staticmethod
    def of(runs: Sequence[Sequence[StreamTimes]], prefix: int) -> PrefixReuse:
        """runs: each run's requests, at least one of all whole; prefix: tokens that all of a run begin with."""
        answered = [[each for each in run if not each.error] for run in runs]
        whole = [sorted(run, key=lambda each: each.sent) for run in answered if run]
        every = [stream for run in whole for stream in run]
        prompts = sum(stream.prompt_tokens for stream in every)
        cached = sum(stream.cached_tokens for stream in every)
        least = prompts - prefix * (len(every) - len(whole))
        return PrefixReuse(
            Spread.of(run[0].ttft for run in whole).p50,
            Spread.of(stream.ttft for run in whole for stream in run[1:]).p50,
            cached / prompts,
            (prompts - cached) / least,
        )


def _percentile(ordered: Sequence[float], percent: float) -> float:
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
