"""Checkpoints are written by the safetensors library and broken by hand, byte by byte."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flyray.actors.checkpoint import Checkpoint, CheckpointError
from flyray.kernels import formats

EXPERT = "model.layers.1.mlp.experts.0.gate_proj"
NATIVE_CONFIG: dict[str, Any] = {
    "text_config": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "strategy": "group",
                        "group_size": 32,
                        "symmetric": True,
                        "actorder": None,
                    }
                }
            },
        }
    }
}


def quark_config(*stages: tuple[str, str], **export: str) -> dict[str, Any]:
    weight: Any = [{"dtype": dtype, "qscheme": scheme} for dtype, scheme in stages]
    return {
        "quantization_config": {
            "quant_method": "quark",
            "global_quant_config": {"weight": weight if len(weight) > 1 else weight[0]},
            "export": {"pack_method": "reorder", **export},
        }
    }


QUARK_INT4 = quark_config(("fp8_e4m3", "per_tensor"), ("int4", "per_channel"))["quantization_config"]


def write(folder: Path, files: dict[str, dict[str, torch.Tensor]], config: dict[str, Any], index: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if index:
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dtypes_file() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(6, 4, generator=generator)
    return {
        "f32": real,
        "bf16": real.to(torch.bfloat16),
        "f16": real.to(torch.float16),
        "f8": real.to(torch.float8_e4m3fn),
        "i8": torch.arange(-12, 12, dtype=torch.int8).reshape(6, 4),
        "u8": torch.arange(24, dtype=torch.uint8).reshape(6, 4),
        "i32": torch.arange(-12, 12, dtype=torch.int32).reshape(6, 4),
        "i64": torch.arange(24).reshape(2, 3, 4),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 7),
    }


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    first = {f"language_model.model.{name}": tensor for name, tensor in dtypes_file().items()}
    second = {"vision_tower.weight": torch.ones(3), "language_model.lm_head.weight": torch.arange(8.0).reshape(4, 2)}
    return write(tmp_path / "model", {"model-1.safetensors": first, "model-2.safetensors": second}, {})


@pytest.mark.parametrize("index", [True, False])
def test_every_dtype_reads_back(tmp_path: Path, index: bool) -> None:
    checkpoint = Checkpoint(write(tmp_path / "m", {"model.safetensors": dtypes_file()}, {"a": 1}, index))
    assert checkpoint.prefix == ""
    assert checkpoint.config == {"a": 1}
    for name, tensor in dtypes_file().items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(
            read.view(torch.uint8) if read.dim() else read, tensor.view(torch.uint8) if tensor.dim() else tensor
        )


def test_names_come_without_the_prefix(two_files: Path) -> None:
    checkpoint = Checkpoint(two_files)
    assert checkpoint.prefix == "language_model."
    assert checkpoint.has("lm_head.weight")
    assert checkpoint.has("model.f32")
    assert checkpoint.has("vision_tower.weight")
    assert not checkpoint.has("language_model.lm_head.weight")
    assert checkpoint.stored_name("lm_head.weight") == "language_model.lm_head.weight"
    assert checkpoint.stored_name("vision_tower.weight") == "vision_tower.weight"
    assert len(checkpoint.names) == 12
    assert checkpoint.entry("lm_head.weight").file.name == "model-2.safetensors"


def test_rows_are_read_alone(two_files: Path) -> None:
    checkpoint = Checkpoint(two_files)
    rows = checkpoint.read_rows("model.i32", 2, 5)
    assert torch.equal(rows, dtypes_file()["i32"][2:5])
    assert checkpoint.bytes_read == 3 * 4 * 4
    assert checkpoint.read_rows("model.i64", 1, 2).shape == (1, 3, 4)
    assert checkpoint.read_rows("model.bf16", 3, 3).shape == (0, 4)
    for low, high in ((0, 7), (-1, 2), (3, 2)):
        with pytest.raises(CheckpointError, match=rf"rows {low}\.\.{high} of tensor model.i32"):
            checkpoint.read_rows("model.i32", low, high)
    with pytest.raises(CheckpointError, match=r"rows 0\.\.1 of tensor model.scalar"):
        checkpoint.read_rows("model.scalar", 0, 1)


def test_tensors_that_are_not_as_expected_are_named(two_files: Path) -> None:
    checkpoint = Checkpoint(two_files)
    with pytest.raises(CheckpointError, match=r"tensor language_model\.model\.nothing is missing"):
        checkpoint.read("model.nothing")
    with pytest.raises(CheckpointError, match=r"model-1.*model\.i8 has dtype int8, expected bfloat16 or float32"):
        checkpoint.read("model.i8", (torch.bfloat16, torch.float32))
    with pytest.raises(CheckpointError, match=r"tensor model\.f32 has shape \[6, 4\], expected \[4, 6\]"):
        checkpoint.read("model.f32", torch.float32, (4, 6))
    assert checkpoint.bytes_read == 0


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def cut(size: int) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(file.read_bytes()[:size])


def header_change(**fields: Any) -> Callable[[Path], None]:
    return lambda file: rewrite_header(file, lambda header: header["language_model.model.i8"].update(fields))


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    ("no length", cut(5), "truncated: 5 bytes"),
    ("half a header", cut(40), "truncated: header of"),
    (
        "half the data",
        lambda f: f.write_bytes(f.read_bytes()[:-30]),
        r"truncated: tensor \S+ ends at byte",
    ),
    ("not safetensors", lambda f: f.write_bytes(b"\xff" * 64), "not a safetensors file"),
    ("not JSON", lambda f: f.write_bytes(struct.pack("<Q", 4) + b"{nos"), "header is not JSON"),
    ("a list", lambda f: f.write_bytes(struct.pack("<Q", 2) + b"[]"), "not a JSON object"),
    ("unknown dtype", header_change(dtype="F4"), r"tensor language_model\.model\.i8 has dtype F4; known are"),
    (
        "size",
        header_change(shape=[6, 5]),
        r"model\.i8: 24 bytes do not hold shape \[6, 5\] of I8",
    ),
    ("negative", header_change(shape=[-6, -4]), r"tensor language_model\.model\.i8: shape \[-6, -4\]"),
    ("offsets", header_change(data_offsets=[30, 6]), r"offsets \[30, 6\] are not valid"),
    ("no offsets", header_change(data_offsets=None), "lacks dtype, shape or data_offsets"),
    ("past the end", header_change(data_offsets=[10**6, 10**6 + 24]), r"truncated: tensor language_model\.model\.i8"),
]


@pytest.mark.parametrize(("what", "damage", "message"), BROKEN, ids=[what for what, _, _ in BROKEN])
def test_a_damaged_file_is_named(two_files: Path, what: str, damage: Callable[[Path], None], message: str) -> None:
    damage(two_files / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=rf"model-1\.safetensors.*{message}"):
        Checkpoint(two_files)


def test_a_file_cut_after_opening_is_named(two_files: Path) -> None:
    checkpoint = Checkpoint(two_files)
    cut(checkpoint.entry("lm_head.weight").begin + 4)(two_files / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: truncated while reading tensor lm_head\.weight"):
        checkpoint.read("lm_head.weight")
    (two_files / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read for tensor lm_head\.weight: No such file"):
        checkpoint.read("lm_head.weight")


def test_an_index_that_lies_is_refused(two_files: Path) -> None:
    index = two_files / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]

    def refused(change: dict[str, str], message: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map | change}))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(two_files)

    refused({"x": "model-9.safetensors"}, r"names model-9\.safetensors, which is not there")
    refused({"x": "../model-1.safetensors"}, "not a file of this folder")
    refused({"gone.weight": "model-1.safetensors"}, r"model-1\.safetensors: tensor gone\.weight is missing")
    refused({"language_model.lm_head.weight": "model-1.safetensors"}, r"it is in model-2\.safetensors")
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint(two_files)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors\.index\.json nor any"):
        Checkpoint(tmp_path)


def test_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    one = {"model.norm.weight": torch.ones(4)}
    folder = write(tmp_path / "m", {"a.safetensors": one, "b.safetensors": one}, {}, index=False)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor model\.norm\.weight is also in a\.safetensors"):
        Checkpoint(folder)
    shutil.rmtree(folder)
    both = {"model.norm.weight": torch.ones(4), "language_model.model.norm.weight": torch.ones(4)}
    with pytest.raises(CheckpointError, match="with and without the prefix"):
        Checkpoint(write(folder, {"a.safetensors": both}, {}))


def expert_tensors(format: str, rows: int = 8, columns: int = 64) -> dict[str, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    values, group_scale = formats.quantize_native(weight)
    packed = formats.pack_native(values)
    row = torch.ones(rows)
    return {
        "bf16": {"weight": weight.to(torch.bfloat16)},
        "w4a16": {
            "weight_packed": packed,
            "weight_scale": group_scale,
            "weight_shape": torch.tensor([rows, columns], dtype=torch.int32),
        },
        "w4a8": {
            "weight_packed": packed,
            "weight_multiplier": torch.full((rows, columns // 64), 0x11, dtype=torch.uint8),
            "weight_scale": row,
        },
        "w8a8": {"weight": values, "weight_scale": row, "weight_zero_point": torch.zeros(rows, dtype=torch.int8)},
        "w8a8-fp8": {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": row},
        "w4a8-channel": {
            "weight": formats.pack_awq(values),
            "weight_scale": torch.tensor(1.0),
            "weight_scale_2": row,
        },
    }[format]


CONFIGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "w4a16": NATIVE_CONFIG,
    "w4a8": {"quantization_config": {"quant_method": "flyray", "format": "w4a8"}},
    "w8a8": quark_config(("int8", "per_channel")),
    "w8a8-fp8": quark_config(("fp8_e4m3", "per_channel")),
    "w4a8-channel": quark_config(("fp8_e4m3", "per_tensor"), ("int4", "per_channel")),
}


def expert_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Checkpoint:
    named = {f"language_model.{EXPERT}.{part}": tensor for part, tensor in tensors.items()}
    return Checkpoint(write(folder, {"model.safetensors": named}, config))


@pytest.mark.parametrize("format", formats.FORMATS)
def test_every_format_is_recognized(tmp_path: Path, format: str) -> None:
    assert expert_checkpoint(tmp_path / "m", expert_tensors(format), CONFIGS[format]).expert_format() == format


@pytest.mark.parametrize(("format", "stated"), list(itertools.permutations(formats.FORMATS, 2)))
def test_config_and_tensors_must_agree(tmp_path: Path, format: str, stated: str) -> None:
    checkpoint = expert_checkpoint(tmp_path / "m", expert_tensors(format), CONFIGS[stated])
    with pytest.raises(CheckpointError, match=rf"says {stated}, but the experts' tensors are {format} .*{EXPERT}"):
        checkpoint.expert_format()


def test_experts_of_no_known_format_are_refused(tmp_path: Path) -> None:
    tensors = expert_tensors("w8a8-fp8") | {"weight_scale_inv": torch.ones(8)}
    with pytest.raises(CheckpointError, match=rf"{EXPERT} .*weight_scale_inv float32 \[8\].*no known format"):
        expert_checkpoint(tmp_path / "a", tensors, {}).expert_format()
    tensors = expert_tensors("w4a16") | {"weight_scale": torch.ones(8, 4, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.weight_scale has shape \[8, 4\], expected \[8, 2\]"):
        expert_checkpoint(tmp_path / "b", tensors, NATIVE_CONFIG).expert_format()
    with pytest.raises(CheckpointError, match="no routed experts"):
        Checkpoint(write(tmp_path / "c", {"model.safetensors": {"lm_head.weight": torch.ones(2)}}, {})).expert_format()


def test_experts_of_two_formats_are_refused(tmp_path: Path) -> None:
    tensors = {f"{EXPERT}.{part}": tensor for part, tensor in expert_tensors("bf16").items()}
    other = EXPERT.replace("gate", "up")
    tensors |= {f"{other}.{part}": tensor for part, tensor in expert_tensors("w8a8").items()}
    checkpoint = Checkpoint(write(tmp_path / "m", {"model.safetensors": tensors}, {}))
    with pytest.raises(CheckpointError, match="in several formats"):
        checkpoint.expert_format()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'; known are"),
        (quark_config(("int4", "per_group")), "known are"),
        (
            quark_config(("fp8_e4m3", "per_tensor"), ("int4", "per_channel"), pack_method="order"),
            "'order'; only 'reorder'",
        ),
        ({"quantization_config": {"quant_method": "flyray", "format": "w2"}}, "format is 'w2', not one of"),
        ({"quantization_config": QUARK_INT4 | {"export": "order"}}, "'order'; only 'reorder'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "lacks 'config_groups'"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        expert_checkpoint(tmp_path / "m", expert_tensors("bf16"), config).expert_format()


def test_another_group_size_is_refused(tmp_path: Path) -> None:
    config = json.loads(json.dumps(NATIVE_CONFIG))
    config["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 128
    with pytest.raises(CheckpointError, match="group_size is 128; only 32 can be read"):
        expert_checkpoint(tmp_path / "m", expert_tensors("w4a16"), config).expert_format()


def test_columns_that_do_not_fit_the_groups_are_refused(tmp_path: Path) -> None:
    def tensors(width: int, groups: int) -> dict[str, torch.Tensor]:
        return {
            "weight_packed": torch.zeros(8, width, dtype=torch.int32),
            "weight_scale": torch.ones(8, groups, dtype=torch.bfloat16),
        }

    with pytest.raises(CheckpointError, match=rf"{EXPERT} has 40 columns; w4a16 needs a multiple of 32"):
        expert_checkpoint(tmp_path / "a", tensors(5, 2), NATIVE_CONFIG).expert_format()
    folded = tensors(12, 3) | {"weight_multiplier": torch.ones(8, 2, dtype=torch.uint8), "weight_scale": torch.ones(8)}
    with pytest.raises(CheckpointError, match=rf"{EXPERT} has 96 columns; w4a8 needs a multiple of 64"):
        expert_checkpoint(tmp_path / "b", folded, CONFIGS["w4a8"]).expert_format()
