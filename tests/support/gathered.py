"""Statistics folders filled by hand."""

from __future__ import annotations

from pathlib import Path

import torch

from flyray.actors.statistics_plan import StatisticsPlan
from flyray.actors.statistics_writer import ShardStatistics, StatisticsFolder


def write_statistics(path: Path, plan: StatisticsPlan, tokens: int, seed: int = 0) -> Path:
    """Random sums whose counts fit `tokens`; what is in them depends on layer and expert, not on the shards."""
    folder = StatisticsFolder(path, plan)
    shards = [ShardStatistics(path, plan, shard) for shard in range(len(plan.experts))]
    for layer in plan.layers:
        generator = torch.Generator().manual_seed(1000 * seed + layer)
        counts = torch.zeros(plan.num_experts, dtype=torch.int64)
        for _ in range(tokens):
            counts[torch.randperm(plan.num_experts, generator=generator)[: plan.top_k]] += 1
        for expert in range(plan.num_experts):
            _fill(shards, plan, layer, expert, int(counts[expert]), generator)
    for shard in shards:
        shard.flush()
    folder.complete(tokens)
    return path


def _fill(
    shards: list[ShardStatistics], plan: StatisticsPlan, layer: int, expert: int, count: int, generator: torch.Generator
) -> None:
    """The sums of one expert, from `count` random inputs with a few large channels."""
    shard = next(index for index, experts in enumerate(plan.experts) if expert in experts)
    sums, local = shards[shard].layer(layer), expert - plan.experts[shard].start
    sums.count[local] = count
    if not count:
        return
    for name, size in (("input", plan.hidden_size), ("inner", plan.inner_size)):
        channels = torch.where(torch.arange(size) % 7 == 3, 8.0, 1.0)
        rows = torch.randn(count, size, generator=generator) * channels
        getattr(sums, f"{name}_absmax")[local] = rows.abs().amax(0)
        getattr(sums, f"{name}_energy")[local] = rows.double().square().sum(0)
        moments = getattr(sums, f"{name}_moments")
        if moments is not None:
            blocks, block, _ = plan.blocks(size)
            cut = rows.double().view(count, blocks, block).movedim(0, 1)
            target = moments if name == "input" else moments[local]
            target += cut.mT @ cut
