"""Rounding through Quark: the bytes of its own export, whatever the matrices are and however they are grouped."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from source_checkpoints import NATIVE_QUANTIZATION, native_tensors

from flyray.cluster.quantize.matrix import QuantizeError
from flyray.cluster.quantize.quark_config import FORMATS
from flyray.cluster.quantize.quark_quantizer import (
    ROW_WISE,
    import_quark,
    quark_bytes,
    quark_quantizer,
    quark_round,
)
from flyray.kernels import formats

Matrices = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def matrices() -> Matrices:
    """Routed experts in the native format, and linears in bfloat16, under their own names."""
    found: Matrices = {}
    for name, tensor in native_tensors().items():
        module, _, part = name.rpartition(".")
        linear = part == "weight" and tensor.dim() == 2 and "embed" not in module
        if linear or ".experts." in module:
            found.setdefault(module, {})[part] = tensor
    assert {"weight_packed", "weight"} == {part for parts in found.values() for part in parts} - {
        "weight_scale",
        "weight_shape",
    }
    return found


def same(one: Matrices, other: Matrices) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [(one[name][part], other[name].get(part)) for name in one for part in one[name]]
    return all(b is not None and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


@pytest.mark.parametrize("format", FORMATS)
def test_linears_and_matrices_are_what_quark_writes_itself(matrices: Matrices, tmp_path: Path, format: str) -> None:
    """The oracle is Quark on the whole checkpoint, told to exclude nothing, under the tensors' real names."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tensors = {f"{name}.{part}": tensor for name, parts in matrices.items() for part, tensor in parts.items()}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"text_config": {"quantization_config": NATIVE_QUANTIZATION}}))
    quantizer = quark_quantizer(format)
    quantizer.config.exclude = []
    quantizer.direct_quantize_checkpoint(str(source), str(target), device="cpu")
    expected: Matrices = {}
    for stored, tensor in load_file(target / "model.safetensors").items():
        module, _, part = stored.rpartition(".")
        expected.setdefault(module, {})[part] = tensor
    made = quark_round(format, matrices)
    assert same(made, expected)
    one = next(iter(matrices))
    assert same(quark_round(format, {one: matrices[one]}), {one: made[one]})


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_independent_only_where_it_is_said(format: str) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 1, 48)[:, None]
    whole = quark_round(format, {"m": {"weight": weight}})["m"]
    pieces = quark_round(format, {"low": {"weight": weight[:17].contiguous()}, "high": {"weight": weight[17:].clone()}})
    parts = [part for part in whole if whole[part].dim()]
    joined = {part: torch.cat((_bits(pieces["low"][part]), _bits(pieces["high"][part]))) for part in parts}
    assert all(torch.equal(joined[part], _bits(whole[part])) for part in parts) == (format in ROW_WISE)


@pytest.mark.parametrize("format", FORMATS)
def test_memory_stays_within_what_is_said(format: str) -> None:
    sizes = [(512, 2048)] * 6 + [(2048, 2048)]
    generator = torch.Generator().manual_seed(0)
    given: Matrices = {}
    for number, (rows, columns) in enumerate(sizes):
        values = torch.randint(-7, 8, (rows, columns), dtype=torch.int8, generator=generator)
        scale = torch.full((rows, columns // formats.GROUP_SIZE), 0.01, dtype=torch.bfloat16)
        given[str(number)] = {"weight_packed": formats.pack_native(values), "weight_scale": scale}
    quark_round(format, {"warm": {"weight": torch.ones(8, 8)}})
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    made = quark_round(format, given)
    used = _status("VmHWM") - before
    assert len(made) == len(sizes)
    assert used <= quark_bytes(format, sizes)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def test_what_is_not_finite_is_named() -> None:
    weight = torch.ones(8, 8)
    weight[3, 4] = torch.inf
    with pytest.raises(QuantizeError, match=r"model\.layers\.0\.mlp\.down_proj\.weight holds values that are not fin"):
        quark_round("w8a8", {"model.layers.0.mlp.down_proj": {"weight": weight}})


def test_quark_making_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = quark_quantizer("w8a8-fp8")
    monkeypatch.setattr("flyray.cluster.quantize.quark_quantizer.quark_quantizer", lambda _format: quantizer)
    with pytest.raises(QuantizeError, match=r"Quark wrote .*float8.* for m, where w8a8 has .*int8"):
        quark_round("w8a8", {"m": {"weight": torch.ones(8, 8)}})


def test_nothing_is_left_below_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_quark()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    quark_round("w8a8", {"m": {"weight": torch.ones(8, 8)}})
    assert [path.name for path in tmp_path.rglob("*")] == [f"flyray-quark-{os.getuid()}"]
