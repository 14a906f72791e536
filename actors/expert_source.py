"""Single routed experts for a running shard, from where its weights came from."""

from __future__ import annotations

from collections.abc import Callable

from ..kernels.cpu.converter import CpuConverter
from ..kernels.protocol import Kernels, LayerExperts
from .checkpoint import Checkpoint
from .model.config import ModelConfig
from .model.expert_reader import ExpertReader
from .model.tensors import check_tensors, routed_tensors
from .model.weight_memory import WeightMemory
from .precision import memory_format
from .quantization_config import MIXED
from .random_weights import random_experts

ReadExpert = Callable[[int, int], LayerExperts]
"""(layer, expert) -> that expert alone, as the kernels' `prepare` lays it out."""


def expert_source(
    path: str, weights: str, config: ModelConfig, precision: str, kernels: Kernels, threads: int
) -> ReadExpert:
    """Experts as `load_shard` reads them from the checkpoint at `path`, or `random_shard` makes them for weights
    "random". What it gives raises CheckpointError, naming the tensor, where one cannot be read."""
    if weights == "random":
        return lambda layer, expert: random_experts(config, precision, layer, (expert,), kernels).blocks[0]
    checkpoint, converter = Checkpoint(path), CpuConverter(threads)
    memory = memory_format(checkpoint.formats.experts, precision)

    def read(layer: int, expert: int) -> LayerExperts:
        disk = checkpoint.formats.matrix(layer, expert)
        check_tensors(checkpoint, routed_tensors(config, layer, expert, disk))
        reader = ExpertReader(checkpoint, config, kernels, WeightMemory(kernels.device), converter)
        return reader.block(layer, (expert,), (disk if memory == MIXED else memory,))

    return read
