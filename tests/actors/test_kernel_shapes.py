"""What a backend that is composed of sources is told of a model, and what an engine then plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepseek_oracle import NATIVE, published_tensors, random_model, save_checkpoint, small_text, write_native
from torch import Tensor

from flyray.actors.engine_config import EngineConfig
from flyray.actors.engine_shape import EngineShape
from flyray.kernels.protocol import Int4Matrix, Int4Weight, Int8Weight
from flyray.kernels.source import LinearShape


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """Of the native format's checkpoint, loaded as w4a8, on AMD's GPUs, of which none is needed."""
    folder: Path = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, small_text(), published_tensors(random_model(small_text(), 2), write_native), NATIVE)
    rounded = {"int8_weights": ("attention",), "int4_weights": ("shared",)}
    return EngineConfig(str(folder), precision="w4a8", backend="rocm", shards=3, kv_pages=4, **rounded)


def test_the_shapes_are_the_models(config: EngineConfig) -> None:
    shape = EngineShape.read(config)
    assert shape.kernel_plan is not None
    shapes, model = shape.kernel_plan.shapes, shape.model
    assert (shapes.expert_kinds, shapes.kv_dtype, shapes.page_size) == ((Int4Matrix,), torch.bfloat16, config.page_size)
    assert (shapes.experts, shapes.local_experts) == (model.n_routed_experts, -(-model.n_routed_experts // 3))
    inner = model.n_shared_experts * model.moe_intermediate_size
    assert LinearShape(Int4Weight, 2 * inner, model.hidden_size) in shapes.linears
    assert LinearShape(Int8Weight, model.hidden_size, model.num_attention_heads * model.v_head_dim) in shapes.linears
    assert LinearShape(Tensor, model.vocab_size, model.hidden_size) in shapes.linears
    assert {each.kind for each in shapes.linears if each.columns == model.intermediate_size} == {Tensor}
    random = EngineShape.read(replace(config, weights="random"))
    assert random.kernel_plan == shape.kernel_plan
    assert set(random.precision_plan[1:]) < set(shape.precision_plan)


def test_the_precision_plan_names_each_source(config: EngineConfig) -> None:
    named = replace(config, kernels=(("experts", ("triton",)), ("rms_norm", ("triton",))))
    lines = EngineShape.read(named).precision_plan
    rows = {line.split("  ")[0]: line for line in lines}
    assert rows["routed experts down"].endswith("triton.experts")
    assert rows["shared experts"].endswith("triton.mlp")
    assert rows["attention"].endswith("triton.linear, .absorb, .mla_attention, .head_linear")
    assert any(line.startswith("triton runs ") and "experts[Int4Matrix]" in line for line in lines)
    assert EngineShape.read(replace(config, backend="triton", kernels=())).kernel_plan is None


def test_sources_that_are_not_there(config: EngineConfig) -> None:
    with pytest.raises(ValueError, match="kernels: 'cuda' is no source of 'rocm'; flydsl, aiter, triton are"):
        replace(config, kernels=(("experts", ("cuda",)),))
    with pytest.raises(ValueError, match="kernels: the backend 'cpu' is one source; rocm has several"):
        replace(config, backend="cpu", kernels=(("experts", ("triton",)),))
    with pytest.raises(ValueError, match="'matmul' is no operation"):
        EngineShape.read(replace(config, kernels=(("matmul", ("triton",)),)))
