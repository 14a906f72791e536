"""Quantized experts and linears against the same quantization written down once more, in float64, inside
transformers' model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepseek_oracle import (
    QUANTIZATION,
    WRITERS,
    oracle_logits,
    published_tensors,
    random_model,
    relative,
    save_checkpoint,
    small_text,
)
from emulation import DIRECT, RECIPES, EmulatedExperts, EmulatedLinear
from mixed_checkpoint import cycle, dense_tensors, int8_linears, write_mixed
from transformers import DeepseekV3ForCausalLM

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.kv_pages import KvPages
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.model.stages import ModelStages
from flyray.actors.weights import load_shard
from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.protocol import Kernels
from flyray.kernels.select import CPU_BACKENDS, select_kernels

TEXT = small_text(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
TOKENS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(4)).tolist()


def exact_kernels(backend: str) -> Kernels:
    """A backend that does not split floats: an activation a millionth off may round to the next integer, and what a few
    of those do to logits is more than many a mistake would."""
    kernels = select_kernels(backend, 1)
    return CpuKernels(1, "portable") if kernels.splits_floats else kernels


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("precision", RECIPES)
def test_expert_outputs_and_logits(precision: str, backend: str, tmp_path: Path) -> None:
    recipe, source, emulated = RECIPES[precision], random_model(TEXT, 21), random_model(TEXT, 21)
    for layer in (1, 2):
        emulated.model.layers[layer].mlp.experts = EmulatedExperts(source.model.layers[layer].mlp.experts, [recipe] * 8)
    tensors = published_tensors(source, WRITERS[recipe.disk])
    checkpoint = Checkpoint(save_checkpoint(tmp_path, TEXT, tensors, QUANTIZATION[recipe.disk]))
    config, kernels = ModelConfig.from_dict(checkpoint.config), exact_kernels(backend)
    weights = load_shard(checkpoint, config, precision, range(8), kernels)

    stages = ModelStages(config, weights, kernels, KvPages.allocate(config, 1, 1, kernels))
    routing = stages.gate(1, torch.randn(6, 64, generator=torch.Generator().manual_seed(9)))
    rows, ids = torch.arange(6, dtype=torch.int32).repeat_interleave(3), routing.ids.flatten()
    experts = emulated.model.layers[1].mlp.experts
    pairs = zip(routing.normed[rows], ids.tolist(), strict=True)
    expected = torch.stack([experts.pair(row, expert) for row, expert in pairs])
    assert relative(stages.experts(1, routing.activations, rows, ids), expected) < 1e-6

    logits = SingleProcessModel(config, weights, kernels, 64).prefill(TOKENS)
    oracle = oracle_logits(emulated, TOKENS)
    assert relative(logits, oracle) < 1e-5
    # So close only because the same quantization was written down: without it the logits are elsewhere.
    assert relative(logits, oracle_logits(source, TOKENS)) > 1e-3


def emulated_linears(model: DeepseekV3ForCausalLM, modules: list[str]) -> None:
    for module in modules:
        parent, _, name = module.rpartition(".")
        setattr(model.get_submodule(parent), name, EmulatedLinear(model.get_submodule(module)))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("formats", [("w4a8", "w8a8", "w4a8-channel"), ("w8a8-fp8",)])
def test_experts_of_several_formats_and_linears_in_int8(formats: tuple[str, ...], backend: str, tmp_path: Path) -> None:
    source, emulated, chosen = random_model(TEXT, 21), random_model(TEXT, 21), cycle(*formats)
    dense = dense_tensors(21, TEXT)
    modules = int8_linears(dense)
    emulated_linears(emulated, modules)
    for layer in (1, 2):
        recipes = [DIRECT[chosen(layer, expert)] for expert in range(8)]
        emulated.model.layers[layer].mlp.experts = EmulatedExperts(source.model.layers[layer].mlp.experts, recipes)
    path = write_mixed(tmp_path, dense, chosen, modules, "language_model.", TEXT)
    kernels = exact_kernels(backend)
    logits = SingleProcessModel.load(path, "auto", kernels, 64).prefill(TOKENS)
    oracle = oracle_logits(emulated, TOKENS)
    assert relative(logits, oracle) < 1e-5
    assert relative(logits, oracle_logits(source, TOKENS)) > 1e-3
