"""One run of each kind for a module."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantized import ALL, Made, shipped_targets
from source_checkpoints import bf16_checkpoint, native_checkpoint, scattered_checkpoint

from flyray.cluster.quantize.command import quantize_all


def _make(source: Path, folder: Path) -> Made:
    targets = {format: folder / format for format in ALL}
    return Made(source, targets, quantize_all(source, shipped_targets(targets), progress=False))


@pytest.fixture(scope="module")
def from_native(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("native")
    return _make(native_checkpoint(folder / "source"), folder)


@pytest.fixture(scope="module")
def from_scattered(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("scattered")
    return _make(scattered_checkpoint(folder / "source"), folder)


@pytest.fixture(scope="module")
def from_bf16(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("bf16")
    return _make(bf16_checkpoint(folder / "source"), folder)
