"""Random weights: zero mean, one standard deviation, and the same for any number of shards."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from tiny_checkpoint import ARCHITECTURE
from torch import Tensor

from flyray.actors.model.config import ModelConfig
from flyray.actors.model.expert_matrix import MATRIX_KINDS
from flyray.actors.model.expert_weight import expert_weight
from flyray.actors.model.layer_weights import MoeWeights, ShardWeights
from flyray.actors.random_weights import STD, random_experts, random_shard
from flyray.kernels.protocol import ExpertWeights, Int8Weight
from flyray.kernels.select import select_kernels

CONFIG = ModelConfig.from_dict(ARCHITECTURE | {"hidden_size": 256, "moe_intermediate_size": 128})


def experts(shard: ShardWeights) -> ExpertWeights:
    mlp = shard.layers[-1].mlp
    assert isinstance(mlp, MoeWeights)
    block = mlp.experts.blocks[0]
    assert isinstance(block, ExpertWeights)
    return block


def values(weights: ExpertWeights, expert: int) -> Tensor:
    weight = expert_weight(weights.gate_up, expert)
    if isinstance(weight, Int8Weight):
        return weight.values * weight.scale[:, None]
    assert isinstance(weight, Tensor)
    return weight.float()


@pytest.mark.parametrize("format", sorted(MATRIX_KINDS))
def test_every_format_has_zero_mean_and_the_standard_deviation(format: str) -> None:
    drawn = values(experts(random_shard(CONFIG, format, range(8), select_kernels("cpu", 1))), 3)
    error = STD / drawn.numel() ** 0.5
    assert abs(float(drawn.mean())) < 5 * error
    assert float(drawn.std()) == pytest.approx(STD, rel=0.02)


def test_an_expert_and_all_else_is_the_same_on_any_shard() -> None:
    kernels = select_kernels("cpu", 1)
    every, some = (
        random_shard(CONFIG, "w4a8", held, kernels, ("head",), ("dense",)) for held in (range(8), range(5, 7))
    )
    for name in ("gate_up", "down"):
        whole, part = getattr(experts(every), name), getattr(experts(some), name)
        for field in fields(part):
            assert torch.equal(getattr(whole, field.name)[5:7], getattr(part, field.name))
            moved = getattr(random_experts(CONFIG, "w4a8", len(every.layers) - 1, (6, 1), kernels).blocks[0], name)
            assert torch.equal(getattr(whole, field.name)[[6, 1]], getattr(moved, field.name))
    assert torch.equal(every.embed, some.embed)
    assert torch.equal(every.head.values, some.head.values)  # pyright: ignore[reportAttributeAccessIssue]
    assert not torch.equal(every.layers[1].attention.w_uk, every.layers[2].attention.w_uk)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format: 'w3a8' is unknown; known are bf16"):
        random_shard(CONFIG, "w3a8", range(8), select_kernels("cpu", 1))
