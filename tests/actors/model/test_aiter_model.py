"""A model of Kimi-K2.5's attention whose entries AITER, emulated from its documentation, reads."""

from __future__ import annotations

import pytest
import torch
from aiter_emulation import emulated, listed_keys
from aiter_signatures import recorded
from kimi_config import kimi_text
from torch import Tensor

from flyray.actors.kernel_shapes import kernel_shapes, rounded_linears
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.random_weights import random_shard
from flyray.kernels.aiter.backend import AiterKernels
from flyray.kernels.aiter.source import AiterSource
from flyray.kernels.composed import ComposedKernels, compose
from flyray.kernels.composition import BackendSource, SourceOrder, choose
from flyray.kernels.protocol import Kernels
from flyray.kernels.reference import ReferenceKernels

CONFIG = ModelConfig.from_dict(
    kimi_text(
        vocab_size=96, hidden_size=128, num_hidden_layers=2, intermediate_size=128, moe_intermediate_size=128,
        n_routed_experts=6, num_experts_per_tok=3, num_attention_heads=24, num_key_value_heads=24, q_lora_rank=64,
        qk_nope_head_dim=16, v_head_dim=16, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )
)  # fmt: skip
TOKENS = torch.randint(0, 96, (21,), generator=torch.Generator().manual_seed(3)).tolist()


def composed(format: str, orders: SourceOrder) -> ComposedKernels:
    base = ReferenceKernels(kv_dtype=torch.bfloat16)
    source = AiterSource(base, "gfx942", AiterKernels(base, emulated(recorded()["main, August 2026"]), listed_keys))
    shapes = kernel_shapes(CONFIG, {format}, rounded_linears((), ()), 6, torch.bfloat16, 16)
    return compose("both", base, [source], choose([source, BackendSource(base)], shapes, orders))


def model(format: str, kernels: Kernels) -> SingleProcessModel:
    return SingleProcessModel(CONFIG, random_shard(CONFIG, format, range(6), kernels), kernels, 64)


def off(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("format", ["w4a8", "w8a8"])
def test_prompts_chunks_and_decoding_give_the_same_bits(format: str) -> None:
    kernels = composed(format, {})
    assert kernels.source("mla_attention") == "aiter"
    running = model(format, kernels)
    whole = running.prefill(TOKENS)
    assert torch.equal(running.prefill(TOKENS, 8), whole)
    running.prefill(TOKENS[:5])
    assert torch.equal(torch.stack([running.decode(token) for token in TOKENS[5:]]), whole[5:])
    assert off(whole, model(format, ReferenceKernels()).prefill(TOKENS)) < 1e-2  # without attention 1.5


@pytest.mark.parametrize("format", ["w4a8", "w8a8", "w8a8-fp8", "bf16"])
def test_experts_that_a_user_names(format: str) -> None:
    kernels = composed(format, {"experts": ("aiter",)})
    assert {choice.source for choice in kernels.plan.choices if choice.operation in ("prepare", "experts")} == {"aiter"}
    expected = model(format, ReferenceKernels()).prefill(TOKENS)
    assert off(model(format, kernels).prefill(TOKENS), expected) < 1e-2  # without experts 0.09
