"""Checkpoints behind fsspec URLs are read as those in a folder are."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from tiny_checkpoint import TINY, write_tiny

from flyray.actors import storage
from flyray.actors.checkpoint import INDEX, Checkpoint, CheckpointError
from flyray.actors.model.config import ModelConfig
from flyray.actors.weights import load_shard
from flyray.kernels.select import select_kernels

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight_packed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("storage"))


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The same files in a file system that is no folder."""
    system = fsspec.filesystem("memory")
    for file in folder.iterdir():
        system.pipe_file(f"/bucket/tiny/{file.name}", file.read_bytes())
    yield "memory://bucket/tiny"
    system.rm("/bucket", recursive=True)


def urls(folder: Path, memory: str) -> list[str]:
    return [f"file://{folder}", memory, f"simplecache::file://{folder}"]


def test_urls_give_the_same_tensors(folder: Path, memory: str) -> None:
    here = Checkpoint(folder)
    for url in urls(folder, memory):
        there = Checkpoint(url)
        assert there.names == here.names
        assert there.config == here.config
        assert there.expert_format() == "w4a16"
        for name in here.names:
            assert torch.equal(there.read(name), here.read(name)), (url, name)
        assert torch.equal(there.read_rows(EXPERT, 3, 9), here.read(EXPERT)[3:9])
        assert there.entry(EXPERT).file.name == "model.safetensors"
        assert pickle.loads(pickle.dumps(there.entry(EXPERT))) == there.entry(EXPERT)


def test_a_file_url_is_a_path_here(folder: Path) -> None:
    assert Checkpoint(f"file://{folder}").path == folder
    assert isinstance(Checkpoint(f"file://{folder}").entry(EXPERT).file, Path)


def test_a_shard_loads_from_a_url(folder: Path, memory: str) -> None:
    config, kernels = ModelConfig.from_dict(TINY), select_kernels("reference", 1)
    ours, theirs = (load_shard(Checkpoint(path), config, "w4a8", range(2, 4), kernels) for path in (folder, memory))
    assert torch.equal(ours.head, theirs.head)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.attention.w_uk, other.attention.w_uk)


def test_long_ranges_are_read_in_pieces(memory: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_RANGE", 100)
    name = "model.embed_tokens.weight"
    assert torch.equal(Checkpoint(memory).read(name), Checkpoint(folder).read(name))


def test_what_is_wrong_there_is_named(folder: Path, memory: str) -> None:
    with pytest.raises(CheckpointError, match=r"memory://bucket/none/config\.json: cannot be read: FileNotFoundError"):
        Checkpoint("memory://bucket/none")
    with pytest.raises(CheckpointError, match=r"nosuch://bucket/x: no file system for this URL: "):
        Checkpoint("nosuch://bucket/x")
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        Checkpoint(f"file://{folder}/none")
    system = fsspec.filesystem("memory")
    file = "/bucket/tiny/model.safetensors"
    checkpoint, whole = Checkpoint(memory), system.cat_file(file)
    entry = checkpoint.entry(EXPERT)
    system.pipe_file(file, whole[: entry.begin + 7])
    with pytest.raises(CheckpointError, match=rf"truncated while reading tensor {EXPERT} at byte {entry.begin + 7}"):
        checkpoint.read(EXPERT)
    with pytest.raises(CheckpointError, match=r"memory://bucket/tiny/model\.safetensors: truncated: tensor"):
        Checkpoint(memory)
    system.rm(file)
    with pytest.raises(CheckpointError, match=rf"cannot be read for tensor {EXPERT}: FileNotFoundError"):
        checkpoint.read(EXPERT)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors\.index\.json nor any"):
        Checkpoint(memory)
    system.pipe_file(f"/bucket/tiny/{INDEX}", b'{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"names gone\.safetensors, which is not there"):
        Checkpoint(memory)
