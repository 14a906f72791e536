"""Bytes on the disk: those of the published checkpoint's index, and of a checkpoint's own files."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import pytest
from loaded_bytes import held
from mixed_checkpoint import cycle, dense_tensors, int8_linears, write_mixed

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.weights import load_shard
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.plan.command import read_model, workload
from flyray.cluster.plan.disk import native_bytes, vision_shapes
from flyray.cluster.plan.gpu import PlanError
from flyray.cluster.synthesize import Synthesis, read_shape
from flyray.cluster.weight_bytes import shard_weight_bytes, weight_bytes
from flyray.kernels.select import select_kernels


def test_kimis_native_checkpoint_has_the_published_indexs_bytes() -> None:
    """metadata.total_size of moonshotai/Kimi-K2.5's model.safetensors.index.json, and its 208,550 names, of which 335
    begin with vision_tower. or mm_projector."""
    content = read_shape("kimi-k2.5")
    found = native_bytes(content, ModelConfig.from_dict(content))
    assert (found.tensors, found.bytes) == (208550, 595148192736)
    assert (found.text_tensors, found.tensors - found.text_tensors) == (208215, 335)
    vision = vision_shapes(content["vision_config"])
    assert found.bytes - found.text_bytes == 2 * sum(map(prod, vision.values()))
    assert vision["mm_projector.proj.2.weight"] == (7168, 4608)


def test_a_checkpoints_own_headers_count() -> None:
    """The demo model is a native checkpoint of text alone: its headers say what its configuration implies."""
    size = 0
    for file in DEMO_MODEL.glob("*.safetensors"):
        with file.open("rb") as handle:
            (header,) = struct.unpack("<Q", handle.read(8))
        size += file.stat().st_size - 8 - header
    found = read_model(str(DEMO_MODEL))
    index = json.loads((DEMO_MODEL / "model.safetensors.index.json").read_text())
    assert (found.disk.bytes, found.disk.tensors) == (size, len(index["weight_map"]))
    assert (found.disk.text_bytes, found.disk.text_tensors) == (size, found.disk.tensors)
    assert found.disk_format == "w4a16"


def test_a_shape_without_a_vision_tower_has_text_alone() -> None:
    found = read_model("bench-1b")
    assert (found.disk.text_tensors, found.disk.text_bytes) == (found.disk.tensors, found.disk.bytes)
    assert not found.disk.read
    assert "vision_config" not in Synthesis("kimi-k2.5").config()  # made without one


def test_int8_linears_of_a_checkpoint_are_planned_as_they_load(tmp_path: Path) -> None:
    dense = dense_tensors(seed=3)
    path = write_mixed(tmp_path / "all", dense, cycle("w8a8"), int8_linears(dense))
    found = read_model(str(path))
    assert (found.disk_format, found.int8_weights) == ("w8a8", ("attention", "shared", "dense"))
    loaded = load_shard(Checkpoint(path), found.config, "auto", range(2), select_kernels("cpu", 1))
    planned = weight_bytes(found.config, "w8a8", found.int8_weights, (), tiled=False)
    assert shard_weight_bytes(found.config, planned, 2) == held(loaded)
    with pytest.raises(PlanError, match="int4_weights: attention: INT8 in the checkpoint"):
        workload(found, "", (), ("attention",), 0, 0, "bf16")


def test_what_lies_in_several_formats_is_refused_by_name(tmp_path: Path) -> None:
    dense = dense_tensors(seed=3)
    some = int8_linears(dense)
    path = write_mixed(tmp_path / "linears", dense, cycle("w8a8"), [name for name in some if "layers.0" not in name])
    with pytest.raises(PlanError, match="some linears of attention are INT8 and some are not"):
        read_model(str(path))
    found = read_model(str(write_mixed(tmp_path / "experts", dense, cycle("w8a8", "w4a8"))))
    with pytest.raises(PlanError, match="in several; name one"):
        workload(found, "", (), (), 0, 0, "bf16")
    assert workload(found, "w4a8", (), (), 0, 0, "bf16").format == "w4a8"
