"""Which experts are measured together, and what they take on disk in either format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...actors.checkpoint import Checkpoint
from ...actors.expert_format import EXPERT_TENSOR
from .sensitivity import Expert, SensitivityError


class Use(Protocol):
    """What of calibration's `Statistics` is needed here."""

    def counts(self, number: int, /) -> Tensor:
        """[E] int64, tokens of layer `number` routed to each expert."""
        ...


@dataclass(frozen=True)
class PlannedUnit:
    """A unit before it is measured: experts of one layer, and the bytes of their tensors in either format."""

    layer: int
    experts: tuple[int, ...]
    bytes_low: int
    bytes_high: int


def plan_units(low: Checkpoint, high: Checkpoint, groups: int, use: Use | None = None) -> tuple[PlannedUnit, ...]:
    """`groups` units of every layer, of sizes that differ by one at most: experts in order of their use, the most used
    first, if `use` is given, else of their numbers.

    Raises SensitivityError if the two checkpoints do not hold the same experts, low does not take less, or there are
    more groups than experts.
    """
    sizes_low, sizes_high = expert_bytes(low), expert_bytes(high)
    if sizes_low.keys() != sizes_high.keys():
        layer, expert = min(sizes_low.keys() ^ sizes_high.keys())
        raise SensitivityError(f"{low.path} and {high.path}: only one of them has expert {expert} of layer {layer}")
    layers: dict[int, list[int]] = defaultdict(list)
    for layer, expert in sorted(sizes_low):
        if sizes_low[layer, expert] >= sizes_high[layer, expert]:
            raise SensitivityError(
                f"low: expert {expert} of layer {layer} takes {sizes_low[layer, expert]:,} bytes in {low.path} and "
                f"{sizes_high[layer, expert]:,} in {high.path}; low must be the smaller"
            )
        layers[layer].append(expert)
    units = []
    for layer, experts in layers.items():
        if groups > len(experts):
            raise SensitivityError(f"groups: {groups} groups of the {len(experts)} experts of layer {layer}")
        if use is not None:
            counts = use.counts(layer).tolist()
            experts.sort(key=lambda expert, counts=counts: (-counts[expert], expert))
        for group in split(experts, groups):
            units.append(
                PlannedUnit(
                    layer,
                    tuple(sorted(group)),
                    sum(sizes_low[layer, expert] for expert in group),
                    sum(sizes_high[layer, expert] for expert in group),
                )
            )
    return tuple(units)


def expert_bytes(checkpoint: Checkpoint) -> dict[Expert, int]:
    """Bytes of every routed expert's tensors."""
    sizes: dict[Expert, int] = defaultdict(int)
    for name in checkpoint.names:
        if match := EXPERT_TENSOR.fullmatch(name):
            sizes[int(match["layer"]), int(match["expert"])] += checkpoint.entry(name).bytes
    return dict(sizes)


def split(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Parts that follow each other, the first ones longer by one where it does not come out even."""
    share, more = divmod(len(items), parts)
    begins = [part * share + min(part, more) for part in range(parts + 1)]
    return [items[begins[part] : begins[part + 1]] for part in range(parts)]
