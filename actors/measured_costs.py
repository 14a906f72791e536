"""What a step's stages took on an engine's shards, as costs for `simulate`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from .request import TracedStep
from .stage_program import SIGNATURES

# How long a message between shards travels: 112 KB over a Unix socket with ZeroMQ take 62 µs. Measured stages cannot
# tell, since those that receive also wait for the slowest sender.
LINK_US = 62.0

_WAITING = frozenset(kind for kind, signature in SIGNATURES.items() if signature.receives)


def stage_costs(steps: Iterable[TracedStep]) -> dict[str, float]:
    """Microseconds of each kind of stage: the median of what was measured.

    A stage that receives also waits; its cost is what the shard that waited least took.
    """
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for step in steps:
        for stage in step.stages:
            times[step.step, stage.name].append((stage.end - stage.begin) / 1000)
    kinds: dict[str, list[float]] = defaultdict(list)
    for (_, name), microseconds in times.items():
        kind = name.partition(".")[0]
        kinds[kind] += [min(microseconds)] if kind in _WAITING else microseconds
    return {kind: median(microseconds) for kind, microseconds in kinds.items()}
