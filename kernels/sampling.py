"""From logits to token ids: greedy, temperature, top-k and top-p, one random number a row.

The random number is a function of (seed, position) alone: splitmix64 as a counter-based generator. A replay of a
sequence therefore draws the same tokens, on any shard and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .protocol import SamplingRow

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """One output of Steele, Lea and Flood's SplitMix64 for a 64-bit state."""
    z = (state + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of (seed, position)."""
    return (splitmix64((splitmix64(seed & _MASK) + position) & _MASK) >> 11) * 2.0**-53


def check_sampling_row(row: SamplingRow) -> None:
    """Refuses values outside their range with a ValueError that names the field."""
    if not 0.0 <= row.temperature < float("inf"):
        raise ValueError(f"sample: temperature is {row.temperature}, expected a finite number >= 0")
    if not 0.0 < row.top_p <= 1.0:
        raise ValueError(f"sample: top_p is {row.top_p}, expected more than 0 and at most 1")
    if row.top_k < 0:
        raise ValueError(f"sample: top_k is {row.top_k}, expected >= 0 (0 is off)")
    if row.position < 0:
        raise ValueError(f"sample: position is {row.position}, expected >= 0")


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """logits [S, V] float, one `SamplingRow` a row -> token ids [S] int64 on the logits' device.

    A row whose largest logit is NaN or infinite is refused with a ValueError; -inf marks a forbidden token.
    """
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[0] != len(rows):
        raise ValueError(
            f"sample: logits is {logits.dtype} {list(logits.shape)}, expected float [{len(rows)}, vocabulary]"
        )
    for row in rows:
        check_sampling_row(row)
    if not rows:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    greedy = logits.argmax(dim=1)
    best = logits.gather(1, greedy[:, None])[:, 0].to(torch.float64).tolist()
    for index, (row, top) in enumerate(zip(rows, best, strict=True)):
        if not -float("inf") < top < float("inf"):
            raise ValueError(f"sample: the largest of logits row {index} is {top}, expected a finite number")
        if row.temperature > 0.0:
            greedy[index] = _draw(logits[index], row, top)
    return greedy


def _draw(logits: Tensor, row: SamplingRow, top: float) -> int:
    """One token of logits [V]: temperature, then top-k, then top-p, then the inverse of the cumulative sum."""
    values, ids = logits.to(torch.float64).sort(descending=True, stable=True)
    if 0 < row.top_k < values.shape[0]:
        values = values[: row.top_k]
    cumulative = torch.exp((values - top) / row.temperature).cumsum(0)
    if row.top_p < 1.0:
        kept = int(torch.searchsorted(cumulative, row.top_p * cumulative[-1], right=False)) + 1
        cumulative = cumulative[:kept]
    chosen = int(torch.searchsorted(cumulative, uniform(row.seed, row.position) * cumulative[-1], right=True))
    return int(ids[min(chosen, cumulative.shape[0] - 1)])
