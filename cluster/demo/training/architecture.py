"""The demo model's sizes, and the configuration that names them as Kimi-K2.5's checkpoint does."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from . import vocabulary

GROUP = 32  # values a scale of the INT4 experts


@dataclass(frozen=True)
class Architecture:
    """DeepSeek-V3's architecture in small; the names follow ``text_config``."""

    vocab_size: int = vocabulary.SIZE
    hidden_size: int = 256
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    n_routed_experts: int = 24
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 256
    intermediate_size: int = 768
    routed_scaling_factor: float = 2.5
    rope_theta: float = 50_000.0
    rms_norm_eps: float = 1e-5
    lora_norm_eps: float = 1e-6  # of q_a_layernorm and kv_a_layernorm
    max_position_embeddings: int = 4096
    yarn_factor: float = 4.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original: int = 1024

    @property
    def query_head_dim(self) -> int:
        """Values of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def plain_frequencies(sizes: Architecture) -> torch.Tensor:
    """RoPE's frequencies ``[rope / 2] f32``."""
    dim = sizes.qk_rope_head_dim
    return sizes.rope_theta ** (-torch.arange(0, dim, 2).float() / dim)


def yarn_frequencies(sizes: Architecture) -> torch.Tensor:
    """YaRN's frequencies ``[rope / 2] f32``: slow ones are divided by the factor, fast ones kept, a ramp between."""
    dim = sizes.qk_rope_head_dim

    def dimension_of(turns: float) -> float:
        return dim * math.log(sizes.yarn_original / (turns * 2 * math.pi)) / (2 * math.log(sizes.rope_theta))

    low = max(math.floor(dimension_of(sizes.yarn_beta_fast)), 0)
    high = min(math.ceil(dimension_of(sizes.yarn_beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    plain = plain_frequencies(sizes)
    return plain / sizes.yarn_factor * ramp + plain * (1 - ramp)


def yarn_softmax_gain(sizes: Architecture) -> float:
    """What YaRN multiplies the attention scores by: the square of ``0.1 ln(factor) + 1`` (mscale_all_dim is 1)."""
    return (0.1 * math.log(sizes.yarn_factor) + 1.0) ** 2


def quantization_config() -> dict[str, Any]:
    """compressed-tensors' description of native Kimi-K2.5: INT4, symmetric, groups of 32, routed experts alone."""
    weights = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": GROUP, "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
    }  # fmt: skip
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def text_config(sizes: Architecture) -> dict[str, Any]:
    """``text_config`` of ``config.json``."""
    yarn = {
        "type": "yarn", "factor": sizes.yarn_factor, "beta_fast": sizes.yarn_beta_fast,
        "beta_slow": sizes.yarn_beta_slow,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": sizes.yarn_original,
    }  # fmt: skip
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "first_k_dense_replace": 1,
        "intermediate_size": sizes.intermediate_size,
        "moe_intermediate_size": sizes.moe_intermediate_size,
        "n_routed_experts": sizes.n_routed_experts,
        "num_experts_per_tok": sizes.num_experts_per_tok,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": sizes.routed_scaling_factor,
        "moe_layer_freq": 1,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_attention_heads,
        "q_lora_rank": sizes.q_lora_rank,
        "kv_lora_rank": sizes.kv_lora_rank,
        "qk_nope_head_dim": sizes.qk_nope_head_dim,
        "qk_rope_head_dim": sizes.qk_rope_head_dim,
        "v_head_dim": sizes.v_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": yarn,
        "max_position_embeddings": sizes.max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "num_nextn_predict_layers": 0,
        "aux_loss_alpha": 0.0,
        "seq_aux": True,
        "use_cache": True,
        "bos_token_id": vocabulary.BOS,
        "eos_token_id": vocabulary.EOS,
        "pad_token_id": vocabulary.PAD,
        "torch_dtype": "bfloat16",
        "quantization_config": quantization_config(),
    }


def config(sizes: Architecture) -> dict[str, Any]:
    """``config.json``."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text_config(sizes),
        "vision_config": None,
        "bos_token_id": vocabulary.BOS,
        "eos_token_id": vocabulary.EOS,
        "pad_token_id": vocabulary.PAD,
        "media_placeholder_token_id": vocabulary.MEDIA_PAD,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


def generation_config(sizes: Architecture) -> dict[str, Any]:
    """``generation_config.json``."""
    return {
        "eos_token_id": [vocabulary.IM_END, vocabulary.EOS],
        "bos_token_id": vocabulary.BOS,
        "pad_token_id": vocabulary.PAD,
        "max_length": sizes.max_position_embeddings,
    }
