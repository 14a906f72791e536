"""Sensitivity files with losses of one's choice."""

from __future__ import annotations

from collections.abc import Sequence

from flyray.cluster.evaluate.intervals import Interval
from flyray.cluster.sensitivity.sensitivity import Base, Loss, Sensitivity, Unit

LOW, HIGH = 600, 1000
"""Bytes of an expert in either format."""


def interval(value: float, half: float = 0.001) -> Interval:
    return Interval(value, value - half, value + half)


def loss(kl: float) -> Loss:
    return Loss(kl=interval(kl), perplexity_ratio=interval(1 + kl), top1=interval(-kl / 2))


def unit(layer: int, experts: Sequence[int], kl: float) -> Unit:
    count = len(experts)
    return Unit(layer=layer, experts=tuple(experts), bytes_low=count * LOW, bytes_high=count * HIGH, loss=loss(kl))


def sensitivity(units: Sequence[Unit], complete: bool = True) -> Sensitivity:
    return Sensitivity(
        fingerprint="model",
        key="key",
        low="w4a8-channel",
        high="w8a8",
        groups=2,
        grouping="number",
        tokens=1000,
        documents=20,
        base=Base(kl=interval(0.01), perplexity_ratio=interval(1.01), top1=interval(0.97), perplexity=interval(9.0)),
        units=tuple(units),
        complete=complete,
    )
