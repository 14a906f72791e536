"""The model configuration: the published forms are read, everything else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from kimi_config import KIMI_ROPE, kimi_text

from flyray.actors.model.config import ModelConfig
from flyray.actors.model.fields import ConfigError


def test_wrapper_and_flat_configurations_are_the_same_model() -> None:
    wrapped = ModelConfig.from_dict({"model_type": "kimi_k25", "text_config": kimi_text()})
    assert wrapped == ModelConfig.from_dict(kimi_text(model_type="deepseek_v3"))
    assert wrapped.kv_width == 576
    assert wrapped.moe_layers == range(1, 61)
    assert wrapped.eos_token_ids == (163585,)


def test_transformers_5_rope_parameters() -> None:
    text = kimi_text()
    rope = {**text.pop("rope_scaling"), "rope_type": "yarn", "rope_theta": text.pop("rope_theta")}
    assert ModelConfig.from_dict(text | {"rope_parameters": rope}) == ModelConfig.from_dict(kimi_text())


def test_plain_rope_has_two_spellings() -> None:
    plain = ModelConfig.from_dict(kimi_text(rope_scaling=None))
    assert plain.rope.yarn is None
    assert plain == ModelConfig.from_dict(kimi_text(rope_parameters={"rope_type": "default", "rope_theta": 50000.0}))


def test_absent_q_lora_rank_and_several_eos() -> None:
    config = ModelConfig.from_dict(kimi_text(q_lora_rank=None, eos_token_id=[5, 7]))
    assert config.q_lora_rank is None
    assert config.eos_token_ids == (5, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func: 'softmax' is not supported; 'sigmoid' is"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias: True is not supported; False is"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: 2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: 8 is not supported; 64"),
        ({"model_type": "llama"}, "model_type: 'llama'"),
        ({"hidden_size": "7168"}, "hidden_size: expected an integer, found '7168'"),
        ({"hidden_size": 0}, "hidden_size: expected at least 1, found 0"),
        ({"kv_lora_rank": None}, "kv_lora_rank: missing; expected an integer"),
        ({"norm_topk_prob": 1}, "norm_topk_prob: expected true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number above 0"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim: expected an even number"),
        ({"first_k_dense_replace": 61}, "first_k_dense_replace: expected within 0..60"),
        ({"num_experts_per_tok": 385}, "num_experts_per_tok: expected within 1..384"),
        ({"n_group": 5}, "n_group: 5 does not divide n_routed_experts 384"),
        ({"n_group": 4, "topk_group": 5}, "topk_group: expected at most n_group 4"),
        ({"n_group": 384, "topk_group": 8}, "n_group: 384 leaves fewer than 2"),
        ({"n_group": 192, "topk_group": 3}, "num_experts_per_tok: 8 exceeds the 6"),
        ({"eos_token_id": 163840}, "eos_token_id"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"rope_scaling": "yarn"}, "rope_scaling: expected an object"),
        ({"rope_scaling": KIMI_ROPE | {"type": "linear"}}, "rope_scaling.rope_type: 'linear' is not supported"),
        ({"rope_scaling": KIMI_ROPE | {"factor": 0}}, "rope_scaling.factor"),
        ({"rope_scaling": KIMI_ROPE | {"long_factor": [1]}}, "rope_scaling.long_factor: unknown"),
        ({"rope_scaling": KIMI_ROPE | {"truncate": False}}, "rope_scaling.truncate: False is not supported"),
        ({"rope_scaling": KIMI_ROPE | {"mscale": None}}, "mscale_all_dim 1.0 is read differently"),
        ({"rope_theta": None}, "rope_theta: missing"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({"model_type": "kimi_k25", "text_config": kimi_text(**changes)})
    assert f"text_config.{message.split(':')[0].split()[0]}" in str(error.value) or "mscale" in message
    assert message in str(error.value)


def test_wrapper_without_text_config() -> None:
    with pytest.raises(ConfigError, match="text_config: missing"):
        ModelConfig.from_dict({"model_type": "kimi_k25"})
