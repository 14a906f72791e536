"""95 % confidence intervals of the two kinds of scores: shares of right answers, and means over unequal pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Interval:
    """An estimate and the 95 % interval around it."""

    value: float
    low: float
    high: float

    def map(self, increasing: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the value."""
        return Interval(increasing(self.value), increasing(self.low), increasing(self.high))


def wilson(right: int, total: int) -> Interval:
    """The share right / total with Wilson's score interval, which is sound also at 0 % and 100 %.

    Raises ValueError when there is nothing to score, or more is right than there is.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} of {total} is no share")
    share = right / total
    shrink = 1 + Z95**2 / total
    centre = (share + Z95**2 / (2 * total)) / shrink
    half = Z95 * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2)) / shrink
    # At 0 % and 100 % the bound is the share itself, but for rounding.
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def ratio_of_sums(sums: Sequence[float], weights: Sequence[float]) -> Interval:
    """sum(sums) / sum(weights) over independent pieces, as nats over tokens of documents.

    The interval is that of the ratio estimator (Cochran, Sampling Techniques, 2.11): its variance is the variance of
    the residuals `sum - ratio * weight` over pieces, so unequal pieces and what their tokens share are allowed for.
    It needs at least two pieces; raises ValueError otherwise.
    """
    pieces = len(sums)
    if pieces < 2 or len(weights) != pieces or min(weights) <= 0:
        raise ValueError(f"{pieces} sums with {len(weights)} weights: two pieces of positive weight are needed")
    total = math.fsum(weights)
    ratio = math.fsum(sums) / total
    squares = math.fsum((part - ratio * weight) ** 2 for part, weight in zip(sums, weights, strict=True))
    error = math.sqrt(squares * pieces / (pieces - 1)) / total
    return Interval(ratio, ratio - Z95 * error, ratio + Z95 * error)
