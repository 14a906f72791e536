"""Prefill and decode logits against transformers' DeepseekV3ForCausalLM in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_oracle import (
    NATIVE,
    native_values,
    oracle_logits,
    published_tensors,
    random_model,
    relative,
    save_checkpoint,
    small_text,
    write_bf16,
    write_native,
)
from torch import Tensor

from flyray.actors.model.single import SingleProcessModel
from flyray.kernels.select import CPU_BACKENDS, select_kernels

PROMPT, ANSWER = 70, 5  # more than one block of keys, and pages that end inside a prompt
MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0}
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}

CASES: dict[str, dict[str, Any]] = {
    "kimi": {"rope_scaling": {"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 32} | MSCALE},
    "plain": {},
    # The latent norms keep their own 1e-6.
    "large eps": {"rms_norm_eps": 0.05},
    "no q_lora": {"q_lora_rank": None, "norm_topk_prob": False},
    "groups": {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 2},
    "groups, all moe": {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "n_shared_experts": 2},
    "yarn 4": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32} | MSCALE},
    "yarn without mscale": {
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16} | BETAS,
        "q_lora_rank": None,
    },
    "yarn with unequal mscales": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 24,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
        }
    },
}


def tokens_for(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, 97, (PROMPT + ANSWER,), generator=generator).tolist()


def run_all(model: SingleProcessModel, tokens: list[int]) -> Tensor:
    """Logits [T, V]: the prompt in one prefill, the rest token by token."""
    prompt = model.prefill(tokens[:PROMPT])
    return torch.cat([prompt, *(model.decode(token)[None] for token in tokens[PROMPT:])])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
def test_bf16_checkpoint(case: str, seed: int, backend: str, tmp_path: Path) -> None:
    text = small_text(**CASES[case])
    oracle = random_model(text, seed)
    path = save_checkpoint(
        tmp_path, text, published_tensors(oracle, write_bf16), None, prefix="language_model." if seed else ""
    )
    model = SingleProcessModel.load(path, "auto", select_kernels(backend, 1), 100)
    tokens = tokens_for(seed)
    assert relative(run_all(model, tokens), oracle_logits(oracle, tokens)) < 1e-4


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_native_checkpoint(prefix: str, backend: str, tmp_path: Path) -> None:
    text = small_text(**CASES["kimi"])
    oracle = random_model(text, 7)
    tensors = published_tensors(oracle, write_native)
    native_values(oracle)
    path = save_checkpoint(tmp_path, text, tensors, NATIVE, prefix)
    tokens = tokens_for(7)
    expected = oracle_logits(oracle, tokens)
    kernels = select_kernels(backend, 1)
    for precision in ("auto", "bf16"):
        model = SingleProcessModel.load(path, precision, kernels, 100)
        assert relative(run_all(model, tokens), expected) < 1e-4


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_chunks_do_not_change_a_bit(backend: str, tmp_path: Path) -> None:
    text = small_text(**CASES["kimi"])
    tensors = published_tensors(random_model(text, 3), write_native)
    path = save_checkpoint(tmp_path, text, tensors, NATIVE)
    tokens = tokens_for(3)
    for precision in ("w4a16", "w4a8"):
        model = SingleProcessModel.load(path, precision, select_kernels(backend, 1), 100)
        whole = run_all(model, tokens)
        for chunk in (1, 7, 64):
            assert torch.equal(model.prefill(tokens, chunk), whole)


def test_checkpoint_saved_by_transformers(tmp_path: Path) -> None:
    text = small_text(**CASES["yarn 4"])
    oracle = random_model(text, 5)
    tokens = tokens_for(5)
    expected = oracle_logits(oracle, tokens)
    oracle.to(torch.bfloat16).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_parameters"]["rope_type"] == "yarn"
    model = SingleProcessModel.load(tmp_path, "auto", select_kernels("reference", 1), 100)
    assert relative(run_all(model, tokens), expected) < 1e-4


def test_single_process_model_refuses(tmp_path: Path) -> None:
    text = small_text()
    path = save_checkpoint(tmp_path, text, published_tensors(random_model(text, 1), write_bf16), None)
    kernels = select_kernels("reference", 1)
    with pytest.raises(ValueError, match=r"max_tokens 129 is not within 1\.\.128"):
        SingleProcessModel.load(path, "auto", kernels, 129)
    model = SingleProcessModel.load(path, "auto", kernels, 4)
    with pytest.raises(ValueError, match="decode needs a prefill"):
        model.decode(1)
    with pytest.raises(ValueError, match="vocab_size is 97"):
        model.prefill([97])
    with pytest.raises(ValueError, match="exceed max_tokens 4"):
        model.prefill([1, 2, 3, 4, 5])
    model.prefill([1, 2, 3, 4])
    with pytest.raises(ValueError, match="exceed max_tokens 4"):
        model.decode(1)
