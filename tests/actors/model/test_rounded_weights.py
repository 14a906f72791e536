"""bfloat16 weights that become INT8 or INT4 while they are loaded: which, to what values, and what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepseek_oracle import NATIVE, published_tensors, random_model, save_checkpoint, small_text, write_native
from mixed_checkpoint import cycle, dense_tensors, int8_linears, write_mixed
from torch import Tensor

from flyray.actors.checkpoint import Checkpoint, CheckpointError
from flyray.actors.engine_config import EngineConfig
from flyray.actors.linear_kinds import LINEAR_KINDS
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.layer_weights import MlpWeights, MoeWeights, ShardWeights
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.precision import PrecisionError, precision_plan
from flyray.actors.weights import load_shard
from flyray.cluster.quantize.recipe import Scheme
from flyray.cluster.quantize.rounding import quantize_matrix
from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.formats import quantize_int8_rows, split_nibbles, unpack_multipliers, unpack_native
from flyray.kernels.protocol import Int4Weight, Int8Weight, LinearWeight
from flyray.kernels.reference_quantizer import ReferenceQuantizer
from flyray.kernels.select import select_kernels

# Columns in whole pairs of groups, as INT4 has them on disk.
TEXT = small_text(q_lora_rank=64, v_head_dim=32, intermediate_size=128)
CONFIG = ModelConfig.from_dict(TEXT)
KERNELS = select_kernels("reference", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tensors = published_tensors(random_model(TEXT, 5), write_native)
    return Checkpoint(save_checkpoint(tmp_path_factory.mktemp("int8"), TEXT, tensors, NATIVE))


def load(checkpoint: Checkpoint, *kinds: str, int4: tuple[str, ...] = ()) -> ShardWeights:
    return load_shard(checkpoint, CONFIG, "w4a8", range(8), KERNELS, int8_weights=kinds, int4_weights=int4)


def linears(weights: ShardWeights) -> dict[str, list[LinearWeight]]:
    """All weights that may be rounded, by kind."""
    found: dict[str, list[LinearWeight]] = {kind: [] for kind in LINEAR_KINDS}
    found["head"].append(weights.head)
    for layer in weights.layers:
        each = layer.attention
        found["attention"] += [each.down, each.q_b, each.output]
        if isinstance(layer.mlp, MlpWeights):
            found["dense"] += [layer.mlp.gate_up, layer.mlp.down]
        else:
            found["shared"] += [layer.mlp.shared.gate_up, layer.mlp.shared.down]
    return found


@pytest.mark.parametrize("kinds", [("attention",), ("shared",), ("dense",), ("head",), tuple(LINEAR_KINDS)])
def test_the_named_kinds_are_rounded_as_w8a8_is(kinds: tuple[str, ...], checkpoint: Checkpoint) -> None:
    plain, weights = load(checkpoint), load(checkpoint, *kinds)
    before = linears(plain)
    for kind, found in linears(weights).items():
        for weight, source in zip(found, before[kind], strict=True):
            assert isinstance(source, Tensor)
            if kind not in kinds:
                assert isinstance(weight, Tensor)
                assert torch.equal(weight, source)
                continue
            values, scale = quantize_int8_rows(source)
            assert isinstance(weight, Int8Weight)
            assert torch.equal(weight.values, values)
            assert torch.equal(weight.scale, scale)
    for layer, source in zip(weights.layers, plain.layers, strict=True):
        assert torch.equal(layer.attention.w_uk, source.attention.w_uk)
        assert torch.equal(layer.attention.w_uv, source.attention.w_uv)
        if isinstance(layer.mlp, MoeWeights):
            assert layer.mlp.gate.dtype is torch.bfloat16


def test_the_model_runs_on_them_with_the_same_bits_on_every_backend(checkpoint: Checkpoint) -> None:
    prompt = [3, 14, 15, 92, 6, 5]
    exact = SingleProcessModel(CONFIG, load(checkpoint), KERNELS, 16).prefill(prompt)
    weights = load(checkpoint, *LINEAR_KINDS)
    logits = SingleProcessModel(CONFIG, weights, KERNELS, 16).prefill(prompt)
    assert torch.equal(SingleProcessModel(CONFIG, weights, CpuKernels(1, "portable"), 16).prefill(prompt), logits)
    error = float((logits - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.3, "8 bits are near, and not the same"


@pytest.mark.parametrize("kinds", [("attention",), ("shared", "dense", "head")])
def test_int4_is_rounded_as_quantize_rounds_floats(kinds: tuple[str, ...], checkpoint: Checkpoint) -> None:
    scheme = Scheme(format="w4a8")
    before, others = linears(load(checkpoint)), [kind for kind in LINEAR_KINDS if kind not in kinds]
    for kind, found in linears(load(checkpoint, *others, int4=kinds)).items():
        for weight, source in zip(found, before[kind], strict=True):
            assert isinstance(source, Tensor)
            if kind not in kinds:
                assert isinstance(weight, Int8Weight)
                continue
            made = quantize_matrix(scheme, "bf16", {"weight": source}, None, ReferenceQuantizer(), 1 << 20).parts
            assert isinstance(weight, Int4Weight)
            assert torch.equal(weight.nibbles, split_nibbles(unpack_native(made["weight_packed"])))
            assert torch.equal(weight.multipliers, unpack_multipliers(made["weight_multiplier"]))
            assert torch.equal(weight.scale, made["weight_scale"])


def test_the_model_runs_in_4_bits_with_the_same_bits_on_every_backend(checkpoint: Checkpoint) -> None:
    prompt = [3, 14, 15, 92, 6, 5]
    exact = SingleProcessModel(CONFIG, load(checkpoint), KERNELS, 16).prefill(prompt)
    weights = load(checkpoint, "head", int4=("attention", "shared", "dense"))
    logits = SingleProcessModel(CONFIG, weights, KERNELS, 16).prefill(prompt)
    assert torch.equal(SingleProcessModel(CONFIG, weights, CpuKernels(1, "portable"), 16).prefill(prompt), logits)
    error = float((logits - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.6, "4 bits are farther than 8, and still the model"


def test_values_that_are_not_finite_are_named_by_their_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flyray.actors.read_ahead._WINDOW", 1000)  # the head is read in many parts
    tensors = published_tensors(random_model(TEXT, 5), write_native)
    tensors["lm_head.weight"][77, 2] = torch.nan
    path = save_checkpoint(tmp_path, TEXT, tensors, NATIVE)
    for kinds in ({"int8_weights": ("head",)}, {"int4_weights": ("head",)}):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: weight of row 77, column 2 is nan"):
            load_shard(Checkpoint(path), CONFIG, "w4a8", range(8), KERNELS, **kinds)


def test_int4_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    text = small_text(q_lora_rank=64)
    path = save_checkpoint(tmp_path, text, published_tensors(random_model(text, 5), write_native), NATIVE)
    config = ModelConfig.from_dict(text)
    says = r"int4_weights: model\.layers\.0\.self_attn\.o_proj has 80 columns, not a multiple of 32; leave 'attention'"
    with pytest.raises(PrecisionError, match=says):
        load_shard(Checkpoint(path), config, "w4a8", range(8), KERNELS, int4_weights=("attention",))
    with pytest.raises(PrecisionError, match=says):
        precision_plan(config, Checkpoint(path), "w4a8", KERNELS, (), ("attention",))


def test_int4_is_not_made_of_int8(tmp_path: Path) -> None:
    dense = dense_tensors(3)
    path = write_mixed(tmp_path, dense, cycle("w4a8"), int8_linears(dense))
    config = ModelConfig.from_dict(Checkpoint(path).config)
    with pytest.raises(PrecisionError, match=r"int4_weights: .* is in INT8 on disk, and INT4 is made of"):
        load_shard(Checkpoint(path), config, "auto", range(8), KERNELS, int4_weights=("shared",))


def test_the_plan_shows_them(checkpoint: Checkpoint) -> None:
    plan = precision_plan(CONFIG, checkpoint, "w4a8", KERNELS, ("attention", "head"), ("shared",))
    rows = {row.kind: row for row in plan.rows}
    head, attention = rows["lm_head"], rows["attention"]
    assert (head.disk, head.memory, head.activations) == ("bf16", "INT8 per row", "INT8 per token")
    assert (attention.memory, attention.activations) == ("INT8 per row, bf16, kv_b split", "f32, INT8 per token")
    shared = rows["shared experts"]
    assert (shared.memory, shared.activations) == ("INT4 g32, u4 multipliers", "INT8 per token")
    assert rows["dense MLP"].memory == "bf16"


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        (("experts",), "int8_weights: 'experts' is unknown; known are attention, shared, dense, head"),
        (("head", "head"), "int8_weights: head, head names a kind twice"),
    ],
)
def test_unknown_kinds_are_refused(kinds: tuple[str, ...], says: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        EngineConfig(model_path=str(tmp_path), int8_weights=kinds)
    with pytest.raises(ValueError, match=says):
        load(checkpoint, *kinds)
    with pytest.raises(ValueError, match=says):
        precision_plan(CONFIG, checkpoint, "w4a8", KERNELS, kinds)
