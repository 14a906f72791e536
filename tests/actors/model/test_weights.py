"""Loading: each shard its own bytes, every format to what the kernels multiply, every damage by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_oracle import (
    NATIVE,
    QUANTIZATION,
    WRITERS,
    Tensors,
    published_tensors,
    random_model,
    save_checkpoint,
    small_text,
    write_bf16,
    write_native,
    write_w4a8,
)
from torch import Tensor

from flyray.actors.checkpoint import Checkpoint, CheckpointError
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.layer_weights import MoeWeights, ShardWeights
from flyray.actors.weights import load_shard
from flyray.kernels.formats import dequantize_native, join_nibbles, multiply_out, quantize_native
from flyray.kernels.protocol import Bf16Matrix, ExpertMatrix, Fp8Matrix, Int4Matrix, Int8Matrix
from flyray.kernels.select import select_kernels

TEXT = small_text()
EXPERTS = TEXT["n_routed_experts"]
KERNELS = select_kernels("reference", 1)
GATE = "model.layers.1.mlp.experts.5.gate_proj"


IN_MEMORY: dict[str, type[ExpertMatrix]] = {
    "bf16": Bf16Matrix,
    "w4a16": Bf16Matrix,
    "w4a8": Int4Matrix,
    "w8a8": Int8Matrix,
    "w8a8-fp8": Fp8Matrix,
    "w4a8-channel": Int8Matrix,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(TEXT, 11)


def checkpoint_of(path: Path, tensors: Tensors, disk: str) -> Checkpoint:
    return Checkpoint(save_checkpoint(path, TEXT, tensors, QUANTIZATION[disk], "language_model."))


def load(checkpoint: Checkpoint, precision: str = "auto", experts: Sequence[int] = range(EXPERTS)) -> ShardWeights:
    return load_shard(checkpoint, ModelConfig.from_dict(checkpoint.config), precision, experts, KERNELS)


def moe(weights: ShardWeights, layer: int = 1) -> MoeWeights:
    mlp = weights.layers[layer].mlp
    assert isinstance(mlp, MoeWeights)
    return mlp


def parts(matrix: ExpertMatrix) -> list[Tensor]:
    return [getattr(matrix, field.name) for field in fields(matrix)]


def dense(matrix: ExpertMatrix, expert: int) -> Tensor:
    """One expert's weights [N, K] float32 by the protocol's definitions."""
    if isinstance(matrix, Bf16Matrix):
        return matrix.values[expert].float()
    if isinstance(matrix, Int4Matrix):
        values = multiply_out(join_nibbles(matrix.nibbles[expert]), matrix.multipliers[expert])
        return values.float() * matrix.scale[expert][:, None]
    return matrix.values[expert].float() * matrix.scale[expert][:, None]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("disk", "precision", "kind", "error"),
    [
        *((disk, "auto", kind, None) for disk, kind in IN_MEMORY.items()),
        ("w4a16", "w4a16", Bf16Matrix, 0.0),
        ("w4a16", "bf16", Bf16Matrix, 0.0),
        ("w4a16", "w4a8", Int4Matrix, 0.06),
        ("w4a16", "w8a8", Int8Matrix, 0.01),
    ],
)
def test_formats_in_memory(
    disk: str, precision: str, kind: type[ExpertMatrix], error: float | None, model: Any, tmp_path: Path
) -> None:
    """error None: what is on disk is what is loaded. Otherwise the relative error against the dequantized source."""
    weights = moe(load(checkpoint_of(tmp_path, published_tensors(model, WRITERS[disk]), disk), precision))
    (block,) = weights.experts.blocks
    assert type(block.gate_up) is type(block.down) is kind
    source = model.model.layers[1].mlp.experts
    for expert in (0, 5):
        for matrix, raw in (
            (block.gate_up, source.gate_up_proj[expert]),
            (block.down, source.down_proj[expert]),
        ):
            found = dense(matrix, expert)
            stored = on_disk(disk, raw.detach())
            if error is None or error == 0.0:
                torch.testing.assert_close(found, stored, rtol=1e-6, atol=0)
            else:
                assert 0 < relative_error(found, stored) < error


def on_disk(disk: str, weight: Tensor) -> Tensor:
    """What a matrix written in a disk format is worth, by arithmetic of its own. weight [N, K]; gate and up together
    where a scale spans one matrix."""
    if disk == "bf16":
        return weight
    if disk in ("w4a16", "w4a8"):
        values, scale = quantize_native(weight)
        groups = values.view(len(values), -1, 32).float()
        if disk == "w4a16":
            return (groups * scale.float()[..., None]).flatten(1).bfloat16().float()
        tensors = write_w4a8(weight)
        packed = tensors["weight_multiplier"]
        multipliers = torch.stack([packed % 16, packed // 16], dim=-1).flatten(1).float()
        return (groups * multipliers[..., None]).flatten(1) * tensors["weight_scale"][:, None]
    if disk == "w8a8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    if disk == "w8a8-fp8":
        scale = weight.abs().amax(1, keepdim=True) / 448
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale
    halves = weight.chunk(2) if weight.shape[0] == 2 * TEXT["moe_intermediate_size"] else (weight,)
    return torch.cat([channel(half) for half in halves])


def channel(weight: Tensor) -> Tensor:
    first = weight.abs().amax() / 448
    second = weight.abs().amax(1, keepdim=True) / first / 7.5
    return (weight / first / second).round().clamp(-8, 7) * (first * second)


def test_w4a8_from_native_and_from_disk_are_the_same(model: Any, tmp_path: Path) -> None:
    folded = load(checkpoint_of(tmp_path / "a", published_tensors(model, write_native), "w4a16"), "w4a8")
    stored = load(checkpoint_of(tmp_path / "b", published_tensors(model, write_w4a8), "w4a8"))
    for left, right in zip(
        parts(moe(folded).experts.blocks[0].gate_up), parts(moe(stored).experts.blocks[0].gate_up), strict=True
    ):
        assert torch.equal(left, right)


@pytest.mark.parametrize("disk", ["w4a16", "w8a8-fp8"])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_shard_reads_its_own_bytes(disk: str, shards: int, model: Any, tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, published_tensors(model, WRITERS[disk]), disk).path
    whole = load(Checkpoint(path))
    expert_bytes = sum(e.bytes for n, e in entries(Checkpoint(path)).items() if ".experts." in n)
    other_bytes = sum(e.bytes for n, e in entries(Checkpoint(path)).items() if ".experts." not in n)
    bounds = [EXPERTS * shard // shards for shard in range(shards + 1)]
    for begin, end in pairwise(bounds):
        checkpoint = Checkpoint(path)
        seen: list[tuple[int, int]] = []
        config = ModelConfig.from_dict(checkpoint.config)
        shard = load_shard(checkpoint, config, "auto", range(begin, end), KERNELS, recorder(seen))
        assert checkpoint.bytes_read == other_bytes + expert_bytes * (end - begin) // EXPERTS
        assert seen[0] == (0, checkpoint.bytes_read)
        assert seen[-1] == (checkpoint.bytes_read, checkpoint.bytes_read)
        assert seen == sorted(seen)
        assert shard.experts == tuple(range(begin, end))
        for layer in (1, 2):
            assert len(moe(shard, layer).experts) == end - begin
            (mine,), (all_experts,) = moe(shard, layer).experts.blocks, moe(whole, layer).experts.blocks
            for part, full in zip(
                parts(mine.gate_up) + parts(mine.down),
                parts(all_experts.gate_up) + parts(all_experts.down),
                strict=True,
            ):
                assert torch.equal(part.view(torch.uint8), full[begin:end].contiguous().view(torch.uint8))


def recorder(seen: list[tuple[int, int]]) -> Callable[[int, int], None]:
    return lambda done, total: seen.append((done, total))


def entries(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: checkpoint.entry(name) for name in checkpoint.names}


@pytest.mark.parametrize("experts", [(), range(4, 9), (3, 5, 3), (-1, 2)])
def test_experts_outside_the_model(experts: Sequence[int], model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not different ones within 0\.\.7"):
        load(checkpoint_of(tmp_path, published_tensors(model, write_bf16), "bf16"), experts=experts)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bf16(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


NORM = "model.layers.1.self_attn.kv_a_layernorm.weight"


@pytest.mark.parametrize(
    ("disk", "changes", "message"),
    [
        ("w4a16", {"lm_head.weight": None}, r"lm_head\.weight is missing"),
        ("w4a16", {NORM: torch.ones(33)}, r"kv_a_layernorm\.weight has shape \[33\], expected \[32\]"),
        (
            "w4a16",
            {NORM: torch.ones(32, dtype=torch.float16)},
            r"kv_a_layernorm.*float16, expected bfloat16 or float32",
        ),
        ("w4a16", {f"{GATE}.weight_scale": None}, rf"tensor {GATE}\.weight_scale is missing; an expert in w4a16"),
        ("w4a16", {f"{GATE}.weight_scale": torch.ones(64, 2)}, rf"{GATE} has .*weight_scale float32"),
        ("w4a16", {f"{GATE}.weight_shape": int32(64, 96)}, r"weight_shape says \[64, 96\], expected \[64, 64\]"),
        ("bf16", {f"{GATE}.weight": torch.ones(64, 64)}, rf"{GATE} has the tensors weight float32"),
        ("bf16", {f"{GATE}.weight": bf16(63, 64)}, rf"{GATE}\.weight has shape \[63, 64\], expected \[64, 64\]"),
        ("w8a8", {f"{GATE}.weight_zero_point": torch.ones(64, dtype=torch.int8)}, r"zero_point has other values"),
        ("w8a8-fp8", {f"{GATE}.weight_scale": torch.ones(1)}, r"weight_scale has shape \[1\], expected \[64\]"),
        ("w4a8-channel", {f"{GATE}.weight_scale": torch.ones(2)}, r"has shape \[2\], expected \[\] or \[1\]"),
        ("w4a8", {f"{GATE}.weight_multiplier": torch.zeros(64, 1, dtype=torch.uint8)}, rf"{GATE}: .*hold a 0"),
    ],
)
def test_damage_is_named(
    disk: str, changes: dict[str, Tensor | None], message: str, model: Any, tmp_path: Path
) -> None:
    tensors = published_tensors(model, WRITERS[disk])
    for name, tensor in changes.items():
        assert name in tensors
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    with pytest.raises(CheckpointError, match=message) as error:
        load(checkpoint_of(tmp_path, tensors, disk))
    assert str(tmp_path) in str(error.value)


def test_a_native_scale_that_cannot_be_folded_is_named(model: Any, tmp_path: Path) -> None:
    tensors = published_tensors(model, write_native)
    tensors[f"{GATE}.weight_scale"][3, 1] = float("nan")
    with pytest.raises(CheckpointError, match=rf"{GATE}: .*row 3, group 1"):
        load(checkpoint_of(tmp_path, tensors, "w4a16"), "w4a8")


def test_columns_that_do_not_fit_a_group(tmp_path: Path) -> None:
    text = small_text(hidden_size=80)
    tensors = published_tensors(random_model(text, 1), lambda weight: pad_native(weight))
    path = save_checkpoint(tmp_path, text, tensors, NATIVE)
    with pytest.raises(CheckpointError, match=r"gate_proj: 80 columns are not a multiple of 32, which w4a16 needs"):
        load(Checkpoint(path))


def pad_native(weight: Tensor) -> Tensors:
    return write_native(torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32)))


def test_mixed_gate_and_up_keep_the_wider_dtype(model: Any, tmp_path: Path) -> None:
    tensors = published_tensors(model, write_bf16)
    up = "model.layers.1.mlp.shared_experts.up_proj.weight"
    tensors[up] = tensors[up].float() + 1e-6
    shared = moe(load(checkpoint_of(tmp_path, tensors, "bf16"))).shared
    assert torch.equal(shared.gate_up[64:], tensors[up])


def test_absorbed_projections(model: Any, tmp_path: Path) -> None:
    attention = load(checkpoint_of(tmp_path, published_tensors(model, write_bf16), "bf16")).layers[0].attention
    joined = model.model.layers[0].self_attn.kv_b_proj.weight.detach().view(4, 24 + 20, 32)
    assert torch.equal(attention.w_uk.float(), joined[:, :24].transpose(1, 2))
    assert torch.equal(attention.w_uv.float(), joined[:, 24:])
    assert attention.w_uk.is_contiguous()
    assert attention.w_uv.is_contiguous()


def test_dequantized_memory_is_the_format_modules(model: Any, tmp_path: Path) -> None:
    tensors = published_tensors(model, write_native)
    gate_up = moe(load(checkpoint_of(tmp_path, tensors, "w4a16"))).experts.blocks[0].gate_up
    assert isinstance(gate_up, Bf16Matrix)
    expected = dequantize_native(tensors[f"{GATE}.weight_packed"], tensors[f"{GATE}.weight_scale"])
    assert torch.equal(gate_up.values[5, :64], expected)
