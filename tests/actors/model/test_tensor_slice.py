"""The slices of tensor-parallel attention are together what one shard has, and no more is read for them."""

from __future__ import annotations

import pytest
import torch
from tiny_checkpoint import write_tiny
from torch import Tensor

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.layer_weights import ShardWeights
from flyray.actors.model.tensor_slice import TensorSlice
from flyray.actors.random_weights import random_shard
from flyray.actors.weights import load_shard
from flyray.kernels.protocol import LinearWeight
from flyray.kernels.select import select_kernels

KERNELS = select_kernels("cpu", 1)
SLICED = ("q_b", "w_uk", "w_uv")
WHOLE = ("input_norm", "down", "q_norm", "kv_norm", "output")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_tiny(tmp_path_factory.mktemp("slices") / "tiny"))


def parts(weight: LinearWeight) -> list[Tensor]:
    return [weight] if isinstance(weight, Tensor) else list(vars(weight).values())


def assert_slices_join(whole: ShardWeights, slices: list[ShardWeights]) -> None:
    pairs = [(whole.head, [part.head for part in slices])]
    for index, layer in enumerate(whole.layers):
        for name in SLICED:
            pairs.append((getattr(layer.attention, name), [getattr(s.layers[index].attention, name) for s in slices]))
        for name in WHOLE:
            for part in slices:
                pairs.append((getattr(layer.attention, name), [getattr(part.layers[index].attention, name)]))
    for expected, found in pairs:
        for place, tensor in enumerate(parts(expected)):
            assert torch.equal(tensor, torch.cat([parts(each)[place] for each in found]))


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
@pytest.mark.parametrize("rounded", [{}, {"int8_weights": ("attention",), "int4_weights": ("head",)}])
def test_slices_of_a_checkpoint_join(shards: int, rounded: dict[str, tuple[str, ...]], checkpoint: Checkpoint) -> None:
    config = ModelConfig.from_dict(checkpoint.config)
    whole = load_shard(checkpoint, config, "w4a8", range(8), KERNELS, **rounded)
    read, slices = [], []
    for part in TensorSlice.all_of(config, shards):
        told: list[tuple[int, int]] = []
        slices.append(
            load_shard(
                checkpoint,
                config,
                "w4a8",
                range(1),
                KERNELS,
                lambda done, total, told=told: told.append((done, total)),
                tensor=part,
                **rounded,
            )
        )
        assert told[-1][0] == told[-1][1]
        read.append(told[-1][0])
    assert_slices_join(whole, slices)
    first = load_shard(checkpoint, config, "w4a8", range(1), KERNELS)
    sliced = sum(each.nbytes for layer in first.layers for each in (layer.attention.w_uk, layer.attention.w_uv))
    sliced += sum(layer.attention.q_b.nbytes for layer in first.layers if isinstance(layer.attention.q_b, Tensor))
    assert isinstance(first.head, Tensor)
    sliced += first.head.nbytes
    assert sum(read) == shards * read_bytes(checkpoint, config) - (shards - 1) * sliced


def read_bytes(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """What a shard with one expert and nothing sliced reads."""
    before = checkpoint.bytes_read
    load_shard(checkpoint, config, "w4a8", range(1), KERNELS)
    return checkpoint.bytes_read - before


@pytest.mark.parametrize("rounded", [{}, {"int8_weights": ("attention",), "int4_weights": ("head",)}])
def test_slices_of_random_weights_join(rounded: dict[str, tuple[str, ...]], checkpoint: Checkpoint) -> None:
    config = ModelConfig.from_dict(checkpoint.config)
    whole = random_shard(config, "w4a8", range(2), KERNELS, **rounded)
    slices = TensorSlice.all_of(config, 3)
    assert_slices_join(whole, [random_shard(config, "w4a8", range(2), KERNELS, tensor=s, **rounded) for s in slices])


def test_uneven_slices_differ_by_one_at_most(checkpoint: Checkpoint) -> None:
    config = ModelConfig.from_dict(checkpoint.config)
    slices = TensorSlice.all_of(config, 3)
    assert [list(part.heads) for part in slices] == [[0, 1], [2], [3]]
    assert [len(part.vocabulary) for part in slices] == [86, 85, 85]
    assert [token for part in slices for token in part.vocabulary] == list(range(256))


def test_a_shard_without_a_head_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="attention: 'tensor_parallel' gives each of 5 shards a head at least"):
        TensorSlice.all_of(ModelConfig.from_dict(checkpoint.config), 5)
