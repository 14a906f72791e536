"""One file written front to back: in order, hashed, whole or not there."""

from __future__ import annotations

import hashlib
import resource
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from flyray.cluster.quantize.matrix import QuantizeError, TensorSpec
from flyray.cluster.quantize.safetensors_writer import SafetensorsWriter

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
specs_of_files = st.lists(st.builds(TensorSpec, st.sampled_from(DTYPES), shapes), max_size=6)


@given(found=specs_of_files, cut=st.integers(1, 4))
def test_any_tensors_come_back_in_any_pieces(
    found: list[TensorSpec], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("writer") / "model.safetensors"
    specs = {f"t{index}": spec for index, spec in enumerate(found)}
    tensors = {
        name: torch.arange(spec.bytes, dtype=torch.int64).to(torch.uint8).view(spec.dtype).reshape(spec.shape)
        for name, spec in specs.items()
    }
    with SafetensorsWriter(path, specs) as writer:
        for name, tensor in tensors.items():
            if not tensor.numel():
                continue
            for rows in tensor.split(cut) if tensor.dim() else [tensor]:
                writer.write(name, rows)
        size, digest = writer.commit()
    assert (size, digest) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(torch.uint8) if tensor.dim() else loaded[name], as_bytes(tensor))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def fill(writer: SafetensorsWriter) -> None:
    """The write itself is done by a thread, so its error comes now or with the commit."""
    writer.write("a", torch.ones(4096))
    writer.commit()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dim() else tensor


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """A limit on file size refuses writes as a full disk does, with an OSError from the kernel."""
    target = tmp_path / "model.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(OSError, match="File too large"),
            SafetensorsWriter(target, {"a": TensorSpec(torch.float32, (4096,))}) as writer,
        ):
            fill(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.int8, (3,))}
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, specs) as writer:
        with pytest.raises(QuantizeError, match="tensor b was given where a comes"):
            writer.write("b", torch.ones(3, dtype=torch.int8))
        writer.write("a", torch.ones(2))
        with pytest.raises(QuantizeError, match="tensor b was not written"):
            writer.commit()
        with pytest.raises(QuantizeError, match="tensor b has 1 bytes too many"):
            writer.write("b", torch.ones(4, dtype=torch.int8))
        writer.write("b", torch.ones(3, dtype=torch.int8))
        with pytest.raises(QuantizeError, match="tensor b was given where the end comes"):
            writer.write("b", torch.ones(3, dtype=torch.int8))
        with pytest.raises(QuantizeError, match=r"tensor a came out as torch\.int8 \[2\], expected torch\.float32 \[2"):
            writer.write("a", torch.ones(2, dtype=torch.int8))
    assert list(tmp_path.iterdir()) == []
