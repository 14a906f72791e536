"""Mixed precision: which experts stay at the high format, so that a budget of bytes loses as little as can be.

The predicted loss of a choice is the sum of its low units' measured losses in KL divergence; a measured loss below
zero is noise and counts as none. All routed experts of a model have one size, so a unit's price is its number of
experts, and the best choice can be found exactly: of units of one size the most sensitive go first, and how many of
each size is a knapsack over a few sizes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..byte_sizes import parse_bytes
from ..sensitivity.sensitivity import Expert, Sensitivity, SensitivityError, Unit
from .matrix import QuantizeError
from .recipe import Mixed

_SHARE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*")


@dataclass(frozen=True)
class Choice:
    """high: the experts that stay at the high format. bytes: of all routed experts then. predicted: the loss in KL
    divergence against all high, nats a token."""

    high: frozenset[Expert]
    bytes: int
    predicted: float


def choose_from_file(
    file: Path,
    mixed: Mixed,
    budget: str | None,
    *,
    experts: Collection[Expert],
    fingerprint: str,
    low_bytes: int,
    high_bytes: int,
) -> Choice:
    """`choose` for a recipe's rule, with the file checked against the model and the rule's formats.

    budget: None for the rule's own. experts: those that the rule decides over; the file may have more.
    fingerprint: the model's, as calibration's. Raises SensitivityError and QuantizeError.
    """
    sensitivity = Sensitivity.read(file)
    sensitivity.check(file, low=mixed.low.format, high=mixed.high.format, experts=experts, fingerprint=fingerprint)
    decided = _units_among(sensitivity, frozenset(experts), file)
    return choose(decided, mixed.budget if budget is None else budget, low_bytes, high_bytes)


def _units_among(sensitivity: Sensitivity, experts: frozenset[Expert], file: Path) -> Sensitivity:
    """The file's units of these experts; one that has others too was measured as a whole, and cannot be used."""
    kept = []
    for unit in sensitivity.units:
        inside = [(unit.layer, expert) in experts for expert in unit.experts]
        if any(inside) and not all(inside):
            raise SensitivityError(
                f"{file}: units has expert {unit.experts[inside.index(False)]} of layer {unit.layer} in one group with "
                f"expert {unit.experts[inside.index(True)]}, but the recipe's mixed rule decides over the second alone"
            )
        if all(inside):
            kept.append(unit)
    return sensitivity.model_copy(update={"units": tuple(kept)})


def choose(sensitivity: Sensitivity, budget: str, low_bytes: int, high_bytes: int) -> Choice:
    """The choice with the least predicted loss that keeps to the budget; the same for any order of units.

    budget: as `budget_bytes`. low_bytes, high_bytes: of one expert's three matrices in either format. What a budget
    leaves over is spent on units that lose nothing measurable. Raises QuantizeError.
    """
    if not 0 < low_bytes < high_bytes:
        raise QuantizeError(
            f"mixed: an expert takes {low_bytes:,} bytes in {sensitivity.low} and {high_bytes:,} in "
            f"{sensitivity.high}; low must be the smaller"
        )
    experts = sum(len(unit.experts) for unit in sensitivity.units)
    limit = budget_bytes(budget, experts * low_bytes, experts * high_bytes)
    room = (limit - experts * low_bytes) // (high_bytes - low_bytes)
    kept = _best(sensitivity.units, room)
    high = frozenset((unit.layer, expert) for unit in kept for expert in unit.experts)
    lost = math.fsum(unit_loss(unit) for unit in sensitivity.units if (unit.layer, unit.experts[0]) not in high)
    return Choice(high, experts * low_bytes + len(high) * (high_bytes - low_bytes), lost)


def budget_bytes(budget: str, low: int, high: int) -> int:
    """Bytes of all routed experts that "400 GB", "1.5 GiB" or "50%" (of the way from all low to all high) allow.

    low, high: bytes when all experts are at the low or the high format. Raises QuantizeError, which states the range.
    """
    if (share := _SHARE.fullmatch(budget)) is not None:
        if (percent := Fraction(share[1])) > 100:
            raise QuantizeError(f"budget {budget!r}: a share lies between 0% (all low) and 100% (all high)")
        return low + math.floor((high - low) * percent / 100)
    limit = parse_bytes(budget)
    if limit is None:
        raise QuantizeError(f'budget {budget!r}: must be bytes, as "400 GB" or "1.5 GiB", or a share, as "50%"')
    if not low <= limit <= high:
        raise QuantizeError(
            f"budget {budget!r}: the routed experts take {_size(low)} when all are low and {_size(high)} when all are "
            "high; give a budget between"
        )
    return limit


def expert_sizes(sensitivity: Sensitivity) -> tuple[int, int]:
    """Bytes of one expert in the low and the high format, as measured; all experts of a model have one size."""
    unit = sensitivity.units[0]
    return unit.bytes_low // len(unit.experts), unit.bytes_high // len(unit.experts)


def unit_loss(unit: Unit) -> float:
    """What a unit at the low format loses, in nats a token."""
    return max(0.0, unit.loss.kl.value)


def _best(units: Sequence[Unit], room: int) -> list[Unit]:
    """The units with the greatest sum of losses whose experts are at most `room`; of equal sums one of more experts."""
    sizes: dict[int, list[Unit]] = defaultdict(list)
    for unit in sorted(units, key=lambda unit: (-unit_loss(unit), unit.layer, unit.experts)):
        sizes[len(unit.experts)].append(unit)
    step = math.gcd(*sizes)
    places = room // step if step else 0
    # saved[c]: the greatest loss avoided with c places, by the sizes seen so far.
    saved = np.zeros(places + 1)
    counts: list[tuple[list[Unit], int, np.ndarray]] = []
    for size in sorted(sizes):
        ranked, width = sizes[size], size // step
        best, taken, sum_of_losses = saved.copy(), np.zeros(places + 1, dtype=np.int64), 0.0
        for count, unit in enumerate(ranked[: places // width], start=1):
            sum_of_losses += unit_loss(unit)
            candidate = saved[: places + 1 - count * width] + sum_of_losses
            window = slice(count * width, None)
            better = candidate >= best[window]
            best[window][better] = candidate[better]
            taken[window][better] = count
        saved = best
        counts.append((ranked, width, taken))
    kept: list[Unit] = []
    for ranked, width, taken in reversed(counts):
        count = int(taken[places])
        kept += ranked[:count]
        places -= count * width
    return kept


def _size(count: int) -> str:
    return f"{count / 1e9:,.3f} GB" if count >= 10**8 else f"{count / 1e6:,.3f} MB"
