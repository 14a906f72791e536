"""Which format each expert and linear of a checkpoint is in; tensors and config.json must agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_oracle import NATIVE, QUANTIZATION, Tensors, save_checkpoint, write_w8a8_fp8
from mixed_checkpoint import (
    TEXT,
    cycle,
    dense_tensors,
    int8_linears,
    mixed_quantization,
    mixed_tensors,
    write_mixed,
)

from flyray.actors.checkpoint import Checkpoint, CheckpointError
from flyray.actors.model.config import ModelConfig
from flyray.actors.precision import PrecisionError, precision_plan
from flyray.actors.weights import load_shard
from flyray.kernels.protocol import Int8Weight
from flyray.kernels.select import select_kernels

PREFIX = "language_model."
FORMATS = ("w4a8", "w8a8", "w4a8-channel")
EXPERT = "model.layers.1.mlp.experts.2"
ATTENTION = "model.layers.0.self_attn"
Change = Callable[[Tensors, dict[str, Any]], None]


@pytest.fixture(scope="module")
def dense() -> Tensors:
    return dense_tensors(7)


def made(path: Path, dense: Tensors, change: Change) -> Checkpoint:
    """A mixed checkpoint with all its linears in INT8, changed."""
    chosen, linears = cycle(*FORMATS), int8_linears(dense)
    tensors, stated = mixed_tensors(dense, chosen, linears), mixed_quantization(dense, chosen, linears, PREFIX)
    change(tensors, stated)
    return Checkpoint(save_checkpoint(path, TEXT, tensors, stated, PREFIX))


def test_every_expert_and_linear_has_its_format(dense: Tensors, tmp_path: Path) -> None:
    checkpoint = made(tmp_path, dense, lambda tensors, stated: None)
    assert checkpoint.expert_format() == "mixed"
    for layer in (1, 2):
        for expert in range(8):
            assert checkpoint.matrix_format(layer, expert) == cycle(*FORMATS)(layer, expert)
    assert checkpoint.formats.int8_linears == set(int8_linears(dense))
    assert len(checkpoint.formats.int8_linears) == 3 * 4 + 3 + 2 * 3
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: model\.layers\.1\.mlp\.experts\.8: no tensors"):
        checkpoint.matrix_format(1, 8)
    kernels = select_kernels("reference", 1)
    weights = load_shard(checkpoint, ModelConfig.from_dict(checkpoint.config), "auto", range(2, 5), kernels)
    assert isinstance(weights.layers[0].attention.down, Int8Weight)
    assert isinstance(weights.layers[0].attention.w_uk, torch.Tensor)
    stored = dense[f"{ATTENTION}.o_proj.weight"].float()
    output = weights.layers[0].attention.output
    assert isinstance(output, Int8Weight)
    assert torch.equal(output.scale, stored.abs().amax(1) / 127)
    assert torch.equal(output.values, (stored / output.scale[:, None]).round().to(torch.int8))


def test_the_plan_says_how_many_experts_are_in_which_format(dense: Tensors, tmp_path: Path) -> None:
    checkpoint = made(tmp_path, dense, lambda tensors, stated: None)
    config, kernels = ModelConfig.from_dict(checkpoint.config), select_kernels("reference", 1)
    plan = precision_plan(config, checkpoint, "auto", kernels)
    assert (plan.disk, plan.memory) == ("mixed", "mixed")
    rows = {row.kind: row for row in plan.rows}
    routed = [(row.kind, row.disk, row.activations) for row in plan.rows if row.kind.startswith("routed experts down")]
    assert routed == [
        ("routed experts down, 5 of 16", "INT8 per row", "INT8 per token and expert"),
        ("routed experts down, 5 of 16", "INT4 g32, u4 multipliers", "INT8 per token and expert"),
        ("routed experts down, 6 of 16", "INT4 per row", "INT8 per token and expert"),
    ]
    assert rows["attention"].disk == "INT8 per row, bf16"
    assert rows["attention"].activations == "f32, INT8 per token"
    assert rows["shared experts"].disk == rows["dense MLP"].memory == "INT8 per row"
    assert rows["dense MLP"].activations == "INT8 per token"
    assert rows["lm_head"].disk == "bf16"
    with pytest.raises(PrecisionError, match="'w8a8' cannot be loaded from a mixed checkpoint, only 'auto' can"):
        precision_plan(config, checkpoint, "w8a8", kernels)


def drop(*names: str) -> Change:
    return lambda tensors, stated: [tensors.pop(name) for name in names] and None


def put(**changes: torch.Tensor) -> Change:
    return lambda tensors, stated: tensors.update({name.replace("__", "."): t for name, t in changes.items()})


def other_activations(tensors: Tensors, stated: dict[str, Any]) -> None:
    for kind in ("gate", "up", "down"):
        at = f"{EXPERT}.{kind}_proj"
        for name in [name for name in tensors if name.startswith(f"{at}.")]:
            del tensors[name]
        tensors |= {f"{at}.{part}": tensor for part, tensor in write_w8a8_fp8(torch.randn(64, 64)).items()}


def other_matrix(tensors: Tensors, stated: dict[str, Any]) -> None:
    at = f"{EXPERT}.up_proj"
    for name in [name for name in tensors if name.startswith(f"{at}.")]:
        del tensors[name]
    tensors[f"{at}.weight"] = torch.randn(64, 64).bfloat16()


def as_fp8(module: str) -> Change:
    def change(tensors: Tensors, stated: dict[str, Any]) -> None:
        weight = torch.randn(tensors[f"{module}.weight"].shape)
        tensors |= {f"{module}.{part}": tensor for part, tensor in write_w8a8_fp8(weight).items()}

    return change


def as_int8(module: str) -> Change:
    def change(tensors: Tensors, stated: dict[str, Any]) -> None:
        rows = tensors[f"{module}.weight"].shape[0]
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].to(torch.int8)
        tensors[f"{module}.weight_scale"] = torch.ones(rows)

    return change


def say(**fields: Any) -> Change:
    return lambda tensors, stated: stated.update(fields)


def say_linears(*left_out: str, more: tuple[str, ...] = ()) -> Change:
    def change(tensors: Tensors, stated: dict[str, Any]) -> None:
        named = [name for name in stated["linears"]["w8a8"] if name.removeprefix(PREFIX) not in left_out]
        stated["linears"] = {"w8a8": [*named, *more]}

    return change


UP = "model.layers.1.mlp.shared_experts.up_proj"


def half_bf16(tensors: Tensors, stated: dict[str, Any]) -> None:
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].bfloat16()
    del tensors[f"{UP}.weight_scale"]
    say_linears(UP)(tensors, stated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_activations, r"experts of layer 1 multiply several kinds of activations: .* is w8a8-fp8, for fp8"),
        (other_matrix, rf"one expert's matrices are in several formats: {EXPERT}\.\w+ is \S+, {EXPERT}\.\w+ is \S+$"),
        (say(experts={"1": {"w8a8": "0-7"}, "2": {"w8a8": "0-7"}}), r"says w8a8, but the experts' tensors are w4a8"),
        (say(experts={"1": {"w8a8": "0,3,6", "w4a8": "2,5"}}), r"says nothing, but the experts' tensors are \S+"),
        (
            lambda tensors, stated: stated["experts"]["2"].update({"bf16": "8"}),
            "experts: there is no expert 8 in layer 2",
        ),
        (say(format="w8a8", experts={}), r"says w8a8, but the experts' tensors are w4a8"),
        (say_linears(f"{ATTENTION}.o_proj"), rf"says bf16 of {PREFIX}{ATTENTION}\.o_proj, but its tensors are w8a8"),
        (say(exclude=["*o_proj"]), rf"says bf16 of {PREFIX}model\.layers\.\d\.self_attn\.o_proj, but .* are w8a8"),
        (say_linears(more=("lm_head",)), r"says w8a8 of language_model\.lm_head, but its tensors are bf16"),
        (say_linears(more=("model.layers.9.mlp.up_proj",)), r"linears names model\.layers\.9\.mlp\.up_proj, of which"),
        (as_fp8(UP), rf"{UP} has the tensors .*: a linear is bfloat16, float32, or INT8"),
        (
            as_int8(f"{ATTENTION}.kv_b_proj"),
            rf"{ATTENTION}\.kv_b_proj has the tensors .*only attention projections but",
        ),
        (as_int8("lm_head"), r"lm_head has the tensors .*: it must be bfloat16 or float32"),
        (drop(f"{UP}.weight_scale"), rf"tensor {UP}\.weight_scale is missing; a linear in INT8 has it"),
        (half_bf16, r"gate_proj is in INT8 and model\.layers\.1\.mlp\.shared_experts\.up_proj is not"),
    ],
)
def test_contradictions_are_refused_by_name(change: Change, message: str, dense: Tensors, tmp_path: Path) -> None:
    checkpoint = made(tmp_path, dense, change)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.expert_format()
    assert str(error.value).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_int8("model.layers.1.mlp.gate"), r"model\.layers\.1\.mlp\.gate\.weight has dtype int8"),
        (as_int8("model.embed_tokens"), r"model\.embed_tokens\.weight has dtype int8"),
        (put(**{f"{UP}.weight_scale": torch.ones(64).bfloat16()}), rf"{UP}\.weight_scale has dtype bfloat16"),
        (put(**{f"{UP}.weight_scale": torch.ones(64, 1)}), rf"{UP}\.weight_scale has shape \[64, 1\], expected \[64\]"),
        (
            put(**{f"{UP}.weight_zero_point": torch.ones(64, dtype=torch.int8)}),
            rf"tensor {UP}\.weight_zero_point has other values than the 0",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(change: Change, message: str, dense: Tensors, tmp_path: Path) -> None:
    checkpoint = made(tmp_path, dense, change)
    config = ModelConfig.from_dict(checkpoint.config)
    with pytest.raises(CheckpointError, match=message):
        load_shard(checkpoint, config, "auto", range(8), select_kernels("reference", 1))


def test_quarks_linears_are_those_that_it_does_not_exclude(dense: Tensors, tmp_path: Path) -> None:
    linears = int8_linears(dense)
    tensors = mixed_tensors(dense, cycle("w8a8"), linears)
    zero_points = {name: torch.zeros(tensors[f"{name}.weight"].shape[0], dtype=torch.int8) for name in linears}
    tensors |= {f"{name}.weight_zero_point": zeros for name, zeros in zero_points.items()}
    stated = {**(QUANTIZATION["w8a8"] or {}), "exclude": ["lm_head", "re:.*kv_b_proj"]}
    checkpoint = Checkpoint(save_checkpoint(tmp_path / "a", TEXT, tensors, stated))
    assert checkpoint.expert_format() == "w8a8"
    assert checkpoint.formats.int8_linears == set(linears)
    model, kernels = ModelConfig.from_dict(checkpoint.config), select_kernels("reference", 1)
    loaded = load_shard(checkpoint, model, "auto", range(8), kernels)
    assert isinstance(loaded.layers[1].attention.down, Int8Weight)
    ours = write_mixed(tmp_path / "ours", dense, cycle("w8a8"), linears)
    assert Checkpoint(ours).formats == checkpoint.formats
    stated["exclude"].append(f"{ATTENTION}.q_b_proj")
    with pytest.raises(CheckpointError, match=rf"says bf16 of {ATTENTION}\.q_b_proj, but its tensors are w8a8"):
        Checkpoint(save_checkpoint(tmp_path / "b", TEXT, tensors, stated)).expert_format()
    fp8 = {**(QUANTIZATION["w8a8-fp8"] or {}), "exclude": ["lm_head", "*kv_b_proj"]}
    both = mixed_tensors(dense, cycle("w8a8-fp8"), linears)
    with pytest.raises(CheckpointError, match=r"says w8a8-fp8 of .*, but its tensors are w8a8"):
        Checkpoint(save_checkpoint(tmp_path / "c", TEXT, both, fp8)).expert_format()


def test_experts_that_quark_excludes_are_bf16(dense: Tensors, tmp_path: Path) -> None:
    def chosen(layer: int, expert: int) -> str:
        return "bf16" if layer == 2 else "w8a8"

    stated = QUANTIZATION["w8a8"] or {}
    stated = {**stated, "exclude": [*stated["exclude"], "model.layers.2.mlp.experts.*"]}
    path = save_checkpoint(tmp_path, TEXT, mixed_tensors(dense, chosen, []), stated)
    assert Checkpoint(path).expert_format() == "mixed"
    assert Checkpoint(path).matrix_format(2, 0) == "bf16"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_weight_shape_may_be_of_either_width(dtype: torch.dtype, dense: Tensors, tmp_path: Path) -> None:
    tensors = mixed_tensors(dense, cycle("w4a16"), [])
    tensors = {name: t.to(dtype) if name.endswith("weight_shape") else t for name, t in tensors.items()}
    checkpoint = Checkpoint(save_checkpoint(tmp_path, TEXT, tensors, NATIVE))
    config = ModelConfig.from_dict(checkpoint.config)
    load_shard(checkpoint, config, "w4a8", range(8), select_kernels("reference", 1))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == NATIVE
