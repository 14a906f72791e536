"""bfloat16 weights that become INT8 while they are loaded: which, to what values, and what the plan says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepseek_oracle import NATIVE, published_tensors, random_model, save_checkpoint, small_text, write_native
from torch import Tensor

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.engine_config import EngineConfig
from flyray.actors.int8_kinds import INT8_KINDS
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.int8_linear import to_int8
from flyray.actors.model.layer_weights import MlpWeights, MoeWeights, ShardWeights
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.precision import precision_plan
from flyray.actors.weights import load_shard
from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.formats import quantize_int8_rows
from flyray.kernels.protocol import Int8Weight, LinearWeight
from flyray.kernels.select import select_kernels

TEXT = small_text()
CONFIG = ModelConfig.from_dict(TEXT)
KERNELS = select_kernels("reference", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tensors = published_tensors(random_model(TEXT, 5), write_native)
    return Checkpoint(save_checkpoint(tmp_path_factory.mktemp("int8"), TEXT, tensors, NATIVE))


def load(checkpoint: Checkpoint, *kinds: str) -> ShardWeights:
    return load_shard(checkpoint, CONFIG, "w4a8", range(8), KERNELS, int8_weights=kinds)


def linears(weights: ShardWeights) -> dict[str, list[LinearWeight]]:
    """All weights that may be in INT8, by kind."""
    found: dict[str, list[LinearWeight]] = {kind: [] for kind in INT8_KINDS}
    found["head"].append(weights.head)
    for layer in weights.layers:
        each = layer.attention
        found["attention"] += [weight for weight in (each.q_a, each.q_b, each.kv_a, each.output) if weight is not None]
        if isinstance(layer.mlp, MlpWeights):
            found["dense"] += [layer.mlp.gate_up, layer.mlp.down]
        else:
            found["shared"] += [layer.mlp.shared.gate_up, layer.mlp.shared.down]
    return found


@pytest.mark.parametrize("kinds", [("attention",), ("shared",), ("dense",), ("head",), tuple(INT8_KINDS)])
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
    weights = load(checkpoint, *INT8_KINDS)
    logits = SingleProcessModel(CONFIG, weights, KERNELS, 16).prefill(prompt)
    assert torch.equal(SingleProcessModel(CONFIG, weights, CpuKernels(1, "portable"), 16).prefill(prompt), logits)
    error = float((logits - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.3, "8 bits are near, and not the same"


def test_large_weights_are_converted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = to_int8("w", weight)
    monkeypatch.setattr("flyray.actors.model.int8_linear._VALUES", 24)
    parts = to_int8("w", weight)
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.scale, whole.scale)
    weight[7, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^lm_head\.weight: "):
        to_int8("lm_head.weight", weight)


def test_the_plan_shows_them(checkpoint: Checkpoint) -> None:
    plan = precision_plan(CONFIG, checkpoint, "w4a8", KERNELS, ("attention", "head"))
    rows = {row.kind: row for row in plan.rows}
    head, attention = rows["lm_head"], rows["attention"]
    assert (head.disk, head.memory, head.activations) == ("bf16", "INT8 per row", "INT8 per token")
    assert (attention.memory, attention.activations) == ("INT8 per row, bf16, kv_b split", "f32, INT8 per token")
    assert rows["shared experts"].memory == rows["dense MLP"].memory == "bf16"


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
