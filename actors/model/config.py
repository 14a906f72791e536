"""The text model's configuration, as published in config.json: Kimi-K2.5, Kimi-K2 and DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...kernels.protocol import GateConfig
from .fields import ConfigError, Fields
from .rope_config import RopeConfig, read_rope

# The published modeling code builds `q_a_layernorm` and `kv_a_layernorm` without passing rms_norm_eps, so these two
# run with the class's default, whatever the configuration says.
LATENT_NORM_EPS = 1e-6

_WRAPPERS = ("kimi_k25",)
_TEXT_TYPES = ("kimi_k2", "deepseek_v3")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of the model, under the names they have in config.json.

    q_lora_rank: None means one `q_proj` instead of `q_a_proj`, `q_a_layernorm`, `q_b_proj`.
    eos_token_ids: tokens that end a text; empty when the configuration names none.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> ModelConfig:
        """Reads config.json, with the text model under `text_config` or flat. Raises ConfigError."""
        fields = _text_fields(raw)
        _refuse_unsupported(fields)
        config = _read(fields)
        _check_attention(config, fields)
        _check_gate(config, fields)
        return config

    @property
    def qk_head_dim(self) -> int:
        """Size of a head's query and key before absorption."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_width(self) -> int:
        """Values a layer caches for a token: the latent and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> range:
        """The layers that have routed experts."""
        return range(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def gate(self) -> GateConfig:
        """What the gate kernel needs to know."""
        return GateConfig(
            top_k=self.num_experts_per_tok,
            n_group=self.n_group,
            topk_group=self.topk_group,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
        )


def _text_fields(raw: Mapping[str, Any]) -> Fields:
    model_type = raw.get("model_type")
    if model_type in _WRAPPERS:
        text = raw.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError(f"text_config: missing; a {model_type} configuration has the text model there")
        fields = Fields(text, "text_config")
    else:
        fields = Fields(raw)
    text_type = fields.get("model_type")
    if text_type not in _TEXT_TYPES:
        known = ", ".join(_WRAPPERS + _TEXT_TYPES)
        raise ConfigError(f"{fields.name('model_type')}: {text_type!r} is not supported; one of {known} is")
    return fields


def _refuse_unsupported(fields: Fields) -> None:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("moe_layer_freq", 1)
    fields.only("tie_word_embeddings", False)
    fields.only("rope_interleave", True, None)
    fields.only("num_key_value_heads", fields.get("num_attention_heads"), None)


def _read(fields: Fields) -> ModelConfig:
    vocab = fields.integer("vocab_size", 1)
    layers = fields.integer("num_hidden_layers", 1)
    experts = fields.integer("n_routed_experts", 1)
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=fields.integer("hidden_size", 1),
        num_hidden_layers=layers,
        first_k_dense_replace=fields.integer("first_k_dense_replace", 0, layers - 1),
        intermediate_size=fields.integer("intermediate_size", 1),
        moe_intermediate_size=fields.integer("moe_intermediate_size", 1),
        n_routed_experts=experts,
        n_shared_experts=fields.integer("n_shared_experts", 1),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 1, experts),
        n_group=fields.integer("n_group", 1, experts),
        topk_group=fields.integer("topk_group", 1),
        norm_topk_prob=fields.boolean("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor", above=0.0),
        num_attention_heads=fields.integer("num_attention_heads", 1),
        q_lora_rank=None if fields.get("q_lora_rank") is None else fields.integer("q_lora_rank", 1),
        kv_lora_rank=fields.integer("kv_lora_rank", 1),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", 1),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim", 2),
        v_head_dim=fields.integer("v_head_dim", 1),
        rms_norm_eps=fields.number("rms_norm_eps", above=0.0),
        rope=read_rope(fields),
        max_position_embeddings=fields.integer("max_position_embeddings", 1),
        bos_token_id=fields.token("bos_token_id", vocab),
        eos_token_ids=fields.tokens("eos_token_id", vocab),
        pad_token_id=fields.token("pad_token_id", vocab),
    )


def _check_attention(config: ModelConfig, fields: Fields) -> None:
    if config.qk_rope_head_dim % 2:
        raise ConfigError(
            f"{fields.name('qk_rope_head_dim')}: expected an even number, found {config.qk_rope_head_dim}"
        )


def _check_gate(config: ModelConfig, fields: Fields) -> None:
    experts, groups = config.n_routed_experts, config.n_group
    if experts % groups:
        raise ConfigError(f"{fields.name('n_group')}: {groups} does not divide n_routed_experts {experts}")
    if config.topk_group > groups:
        raise ConfigError(f"{fields.name('topk_group')}: expected at most n_group {groups}, found {config.topk_group}")
    # A group's score is the sum of its two best experts.
    if groups > 1 and experts // groups < 2:
        raise ConfigError(f"{fields.name('n_group')}: {groups} leaves fewer than 2 of {experts} experts a group")
    reachable = experts // groups * config.topk_group
    if config.num_experts_per_tok > reachable:
        raise ConfigError(
            f"{fields.name('num_experts_per_tok')}: {config.num_experts_per_tok} exceeds the {reachable} experts "
            f"of topk_group {config.topk_group} groups"
        )
