"""Reading ahead: the same bytes in any order, whatever the cut, bounded, and every fault where it is asked for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from flyray.actors import read_ahead
from flyray.actors.checkpoint import Checkpoint, CheckpointError
from flyray.actors.model.weight_memory import WeightMemory

SHAPES = {"a": (7, 33), "b": (5,), "c": (), "d": (300, 9), "e": (0, 4), "f": (1, 4000), "g": (64, 2, 3)}
DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.int64)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{name}{number}": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for number, dtype in enumerate(DTYPES)
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def folder(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ahead")
    names = sorted(tensors)
    for number in range(2):
        save_file({name: tensors[name] for name in names[number::2]}, path / f"{number}.safetensors")
    (path / "config.json").write_text("{}", encoding="utf-8")
    return path


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9000), st.integers(0, 3), st.randoms())
def test_tensors_are_those_of_the_file(
    tensors: dict[str, Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch, window: int, ahead: int, random
) -> None:
    """window: bytes of one; the order of asking is another than was announced."""
    monkeypatch.setattr(read_ahead, "_WINDOW", window)
    monkeypatch.setattr(read_ahead, "_AHEAD", ahead)
    checkpoint, announced = Checkpoint(folder), list(tensors)
    random.shuffle(announced)
    asked = announced[: len(announced) * 3 // 4]
    random.shuffle(asked)
    with checkpoint.reading_ahead(announced):
        for number, name in enumerate(asked):
            found = (checkpoint.read, checkpoint.borrow)[number % 2](name)
            assert found.dtype is tensors[name].dtype
            assert torch.equal(found, tensors[name])
    assert checkpoint.bytes_read == sum(tensors[name].nbytes for name in asked)
    assert torch.equal(checkpoint.read("a0"), tensors["a0"])


def test_a_part_that_is_held_is_never_overwritten(folder: Path, tensors: dict[str, Tensor], monkeypatch) -> None:
    monkeypatch.setattr(read_ahead, "_WINDOW", 500)
    checkpoint = Checkpoint(folder)
    with checkpoint.reading_ahead(tensors):
        held = {name: list(checkpoint.pieces(name)) for name in tensors}
    for name, pieces in held.items():
        assert torch.equal(torch.cat(pieces) if tensors[name].dim() else pieces[0], tensors[name])
    assert len(held["d1"]) > 1


def test_what_is_wrong_is_told_where_it_is_asked_for(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = Checkpoint(tmp_path)
    entry = checkpoint.entry("d0")
    with entry.file.open("r+b") as file:
        file.truncate(entry.begin + 10)
    after = [name for name in tensors if checkpoint.entry(name).file == entry.file]
    with checkpoint.reading_ahead(after), pytest.raises(CheckpointError, match=r"truncated while reading tensor \w+"):
        [checkpoint.read(name) for name in after]
    entry.file.unlink()
    with (
        checkpoint.reading_ahead(["d0"]),
        pytest.raises(CheckpointError, match="cannot be read for tensor d0: No"),
    ):
        checkpoint.read("d0")
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())


def test_weights_lie_one_behind_another_and_aligned() -> None:
    memory = WeightMemory(torch.device("cpu"))
    first, second = memory.empty(torch.int8, 3, 5), memory.empty(torch.float32, 7)
    assert (first.shape, second.shape) == ((3, 5), (7,))
    assert first.data_ptr() % (2 << 20) == 0
    assert second.data_ptr() - first.data_ptr() == 64
    assert memory.empty(torch.bfloat16, 0, 4).shape == (0, 4)
    assert memory.empty(torch.float32).fill_(2.0) == 2.0
    large = memory.empty(torch.uint8, 300 << 20)
    large[-1] = 1
    assert large.data_ptr() % 64 == 0
