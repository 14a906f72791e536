"""A random checkpoint in the native format that has a tokenizer, one token a byte, and its oracle in transformers."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch
from deepseek_oracle import (
    NATIVE,
    native_values,
    published_tensors,
    random_model,
    save_checkpoint,
    small_text,
    write_native,
)
from transformers import DeepseekV3ForCausalLM

from flyray.cluster.config import DEMO_MODEL

VOCABULARY = 288
CONTEXT = 512


def write_byte_model(path: Path, seed: int = 0) -> DeepseekV3ForCausalLM:
    """Writes the checkpoint's folder; returns the same model, in float32, experts rounded as there."""
    text = small_text(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    model = random_model(text, seed)
    with torch.no_grad():
        native_values(model)
    save_checkpoint(path, text, published_tensors(model, write_native), NATIVE)
    ranks = (f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256))
    (path / "tiktoken.model").write_text("\n".join(ranks))
    config = json.loads((DEMO_MODEL / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"].values()
    tokens = {str(256 + index): entry for index, entry in enumerate(added)}
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": tokens}))
    return model


def log_probabilities(model: DeepseekV3ForCausalLM, tokens: list[int]) -> list[float]:
    """Of every token but the first, given those before it."""
    return all_log_probabilities(model, tokens)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].tolist()


def all_log_probabilities(model: DeepseekV3ForCausalLM, tokens: list[int]) -> torch.Tensor:
    """[T - 1, V] float64: of everything that could have stood in the place of every token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1)
