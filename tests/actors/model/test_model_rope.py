"""Rotary tables and softmax scale against transformers' DeepseekV3."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kimi_config import KIMI_ROPE, kimi_text
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale

from flyray.actors.model.config import ModelConfig
from flyray.actors.model.rope import rope_tables, softmax_scale

LENGTH = 512


def yarn(factor: float, original: int = 4096, **changes: Any) -> dict[str, Any]:
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": original} | changes


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        KIMI_ROPE,
        yarn(4.0, 1024, mscale=1.0, mscale_all_dim=1.0),
        yarn(4.0, 64),
        yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707, beta_fast=16, beta_slow=2),
        yarn(40.0, 4096, mscale=1.0, mscale_all_dim=0.5),
        yarn(1.0, 4096, mscale=1.0, mscale_all_dim=1.0),
        yarn(8.0, 256, mscale=1.0, mscale_all_dim=0.0),
    ],
)
def test_tables_and_scale_match_transformers(scaling: dict[str, Any] | None, size: int) -> None:
    raw = kimi_text(rope_scaling=scaling, qk_rope_head_dim=size)
    config = ModelConfig.from_dict(raw)
    plain = {"rope_type": "default", "rope_theta": 50000.0}
    rope = plain if scaling is None else {**scaling, "rope_type": "yarn", "rope_theta": 50000.0}
    theirs = DeepseekV3Config(
        qk_rope_head_dim=size, qk_nope_head_dim=128, rope_parameters=rope, max_position_embeddings=262144
    )
    cos, sin = rope_tables(config, LENGTH)
    expected_cos, expected_sin = DeepseekV3RotaryEmbedding(theirs)(torch.zeros(1), torch.arange(LENGTH)[None])
    torch.testing.assert_close(cos, expected_cos[0, :, : size // 2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin, expected_sin[0, :, : size // 2], rtol=1e-6, atol=1e-6)
    assert cos.dtype == sin.dtype == torch.float32
    expected_scale = yarn_apply_mscale(theirs.rope_parameters, (128 + size) ** -0.5)
    assert softmax_scale(config) == pytest.approx(expected_scale, rel=1e-12)


def test_kimi_softmax_scale() -> None:
    assert softmax_scale(ModelConfig.from_dict(kimi_text())) == pytest.approx(0.144680, abs=5e-7)
