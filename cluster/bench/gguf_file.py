"""A published folder as a GGUF file (version 3, little-endian) of llama.cpp's architecture "deepseek2", in bfloat16.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names and keys as llama.cpp's convert_hf_to_gguf.py
gives them. Without a tokenizer ("none"): what measures and quantizes needs token numbers alone.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...actors.checkpoint import Checkpoint
from ...actors.model.config import ModelConfig
from .rounds import BenchUsageError

_ALIGNMENT = 32
_F32, _BF16 = 0, 30  # ggml_type
_SIGMOID = 2
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    **{f"mlp.experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")},
}
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)(\..*)")


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file. sources: the names it is read of, one or one an expert. part: "k" or "v", of kv_b_proj."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    type: int
    part: str = ""

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * (4 if self.type == _F32 else 2)


def write_gguf(folder: Path, file: Path) -> None:
    """Raises BenchUsageError for a model that the keys written here do not say."""
    checkpoint = Checkpoint(folder)
    config = ModelConfig.from_dict(checkpoint.config)
    if config.rope.yarn is not None:
        raise BenchUsageError(f"{folder}: peer llama.cpp: its rope_scaling is not written into GGUF files")
    stored = list(_stored(checkpoint, config))
    keys = _keys(config)
    with file.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(stored), len(keys)))
        for key, value in keys.items():
            out.write(_text(key) + _value(value))
        at = 0
        for tensor in stored:
            # The fastest dimension comes first.
            sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
            out.write(_text(tensor.name) + sizes + struct.pack("<IQ", tensor.type, at))
            at += -(-tensor.bytes // _ALIGNMENT) * _ALIGNMENT
        for tensor in stored:
            _pad(out)
            dtype = torch.float32 if tensor.type == _F32 else torch.bfloat16
            for part in _parts(checkpoint, config, tensor):
                out.write(part.to(dtype).contiguous().view(torch.uint8).numpy().data)
        _pad(out)


def _keys(config: ModelConfig) -> dict[str, str | int | float | bool]:
    own: dict[str, int | float | bool] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_width,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": config.rope.theta,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": _SIGMOID,
    }
    return {
        "general.architecture": "deepseek2",
        "general.alignment": _ALIGNMENT,
        "tokenizer.ggml.model": "none",
        **{f"deepseek2.{key}": value for key, value in own.items()},
    }


def _stored(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[_Stored]:
    experts = range(config.n_routed_experts)
    for name in checkpoint.names:
        entry, match = checkpoint.entry(name), _EXPERT.fullmatch(name)
        if match is None:
            for part, shape in _shapes(name, entry.shape, config):
                # Norms, the gate and its bias are multiplied in float32.
                wide = len(shape) == 1 or name.endswith("mlp.gate.weight")
                yield _Stored(_name(name.replace("kv_b", f"{part}_b")), (name,), shape, _F32 if wide else _BF16, part)
        elif match[2] == "0":
            sources = tuple(f"{match[1]}.{expert}{match[3]}" for expert in experts)
            yield _Stored(_name(match[1] + match[3]), sources, (len(experts), *entry.shape), _BF16)


def _shapes(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """kv_b_proj is stored as its absorbed halves."""
    if not name.endswith("kv_b_proj.weight"):
        yield "", shape
        return
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    yield "k", (heads, rank, config.qk_nope_head_dim)
    yield "v", (heads, config.v_head_dim, rank)


def _parts(checkpoint: Checkpoint, config: ModelConfig, tensor: _Stored) -> Iterator[Tensor]:
    for source in tensor.sources:
        whole = checkpoint.read(source)
        if tensor.part:
            heads = whole.unflatten(0, (config.num_attention_heads, -1))
            key, value = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            whole = key.transpose(1, 2) if tensor.part == "k" else value
        yield whole


def _name(name: str) -> str:
    """A published name as llama.cpp's."""
    module, _, last = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{last}"
    _, _, layer, inner = module.split(".", 3)
    if last == "e_score_correction_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    return f"blk.{layer}.{_LAYER[inner]}.{last}"


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float | bool) -> bytes:
    """Its type's number, and the value."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<I", 8) + _text(value)


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % _ALIGNMENT))
