"""How far the tokens of a batch spread over the experts: what a decode step reads of them depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...actors.checkpoint import Checkpoint
from ...actors.model.config import ModelConfig
from ...actors.model.single import SingleProcessModel
from ...actors.weights import load_shard
from ...kernels.cpu.backend import CpuKernels
from ...kernels.protocol import GateConfig
from .traffic import LinearBits


class _Watched(CpuKernels):
    """Kernels that keep what the gate chose."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.chosen: list[Tensor] = []

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
        ids, weights = super().gate(x, weight, bias, config)
        self.chosen.append(ids.clone())
        return ids, weights


def touched_experts(
    path: Path,
    format: str,
    linears: LinearBits,
    texts: Sequence[Sequence[int]],
    decoded: int,
    threads: int,
) -> float:
    """Mean over layers and steps of the distinct experts that decoding the last `decoded` tokens of texts together
    touches. format, linears: as the engine ran them. The texts are run again, whole: the gate chooses as it did,
    whatever runs beside a token."""
    kernels = _Watched(threads)
    checkpoint = Checkpoint(path)
    config = ModelConfig.from_dict(checkpoint.config)
    every = range(config.n_routed_experts)
    weights = load_shard(checkpoint, config, format, every, kernels, None, threads, linears.int8, linears.int4)
    model = SingleProcessModel(config, weights, kernels, max(map(len, texts)))
    chosen = []
    with torch.inference_mode():
        for text in texts:
            kernels.chosen.clear()
            model.prefill(text[:-1])  # the last token was sampled and never ran
            chosen.append(torch.stack(kernels.chosen)[:, -(decoded - 1) :])
    return distinct(torch.stack(chosen))


def distinct(chosen: Tensor) -> float:
    """chosen: [sequences, layers, steps, K] expert ids -> mean distinct ones a layer and step."""
    each = chosen.permute(1, 2, 0, 3).flatten(2).flatten(0, 1).sort(-1).values
    return float((each.diff(dim=-1) != 0).sum(-1).add(1).float().mean())
