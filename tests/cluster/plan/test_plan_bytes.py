"""Planned bytes are those of a loaded model."""

from __future__ import annotations

import pytest
from loaded_bytes import held

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.tensor_slice import TensorSlice
from flyray.actors.weights import load_shard
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.weight_bytes import shard_weight_bytes, weight_bytes
from flyray.kernels.select import select_kernels


@pytest.mark.parametrize(
    ("format", "int8_weights", "int4_weights"),
    [("w4a8", (), ()), ("w8a8", ("attention", "shared"), ()), ("bf16", ("head",), ("attention", "shared", "dense"))],
)
def test_planned_bytes_are_those_of_the_loaded_demo_model(
    format: str, int8_weights: tuple[str, ...], int4_weights: tuple[str, ...]
) -> None:
    checkpoint = Checkpoint(DEMO_MODEL)
    config, kernels = ModelConfig.from_dict(checkpoint.config), select_kernels("cpu", 1)
    kinds = {"int8_weights": int8_weights, "int4_weights": int4_weights}
    loaded = load_shard(checkpoint, config, format, range(3, 10), kernels, **kinds)
    planned = weight_bytes(config, format, int8_weights, int4_weights, tiled=False)
    assert shard_weight_bytes(config, planned, 7) == held(loaded)


@pytest.mark.parametrize("shards", [2, 3])
def test_planned_bytes_of_a_slice_are_those_of_a_loaded_one(shards: int) -> None:
    checkpoint = Checkpoint(DEMO_MODEL)
    config, kernels = ModelConfig.from_dict(checkpoint.config), select_kernels("cpu", 1)
    kinds = {"int8_weights": ("head",), "int4_weights": ("attention",)}
    for part in TensorSlice.all_of(config, shards):
        loaded = load_shard(checkpoint, config, "w4a8", range(2), kernels, **kinds, tensor=part)
        planned = weight_bytes(config, "w4a8", ("head",), ("attention",), False, part)
        assert shard_weight_bytes(config, planned, 2) == held(loaded)
