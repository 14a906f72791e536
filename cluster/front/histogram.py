"""A Prometheus histogram that is cheap enough to be told every token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.core import HistogramMetricFamily


class Histogram:
    """Counts of values by upper bounds, which rise; a value equal to a bound counts in its bucket. One thread's."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self._name, self._help, self._bounds = name, help, tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Counts `value` so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, labels: dict[str, str]) -> HistogramMetricFamily:
        """It as Prometheus reads it: counts up to each bound."""
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*map(_number, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(self._name, self._help, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


def _number(bound: float) -> str:
    return str(float(bound))
