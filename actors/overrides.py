"""Routed experts of a running shard that come from another checkpoint for a while, to measure sensitivity."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..kernels.cpu.converter import CpuConverter
from ..kernels.protocol import ExpertMatrix, Kernels
from ..kernels.selfcheck import self_check
from .checkpoint import Checkpoint, CheckpointError
from .expert_format import ACTIVATIONS
from .model.expert_blocks import ExpertBlocks
from .model.expert_matrix import MATRIX_KINDS
from .model.expert_reader import ExpertReader
from .model.stages import ModelStages
from .model.tensors import check_tensors, routed_tensors
from .model.weight_memory import WeightMemory
from .shard_check import check_shapes, matrix_kinds
from .weights import one_torch_thread


class Overrides:
    """One shard's. `prepare` reads, `apply` puts in place between two steps, so that all shards can change together."""

    def __init__(self, stages: ModelStages, kernels: Kernels, page_size: int, threads: int) -> None:
        self._stages, self._kernels, self._page_size = stages, kernels, page_size
        self._converter = CpuConverter(threads)
        self._checked = set(matrix_kinds(stages.weights))
        self._own: dict[int, ExpertBlocks] = {}
        self._prepared: dict[int, ExpertBlocks] = {}

    def prepare(self, layer: int, experts: Sequence[int], path: str | os.PathLike[str]) -> None:
        """Reads those of the layer's `experts` that this shard holds from the checkpoint at `path`, in its format.

        Raises CheckpointError, naming the tensor, for a folder without them, with others of another shape, or whose
        experts multiply other activations; KernelMismatch if a kernel that only they need is wrong.
        """
        self._prepared.clear()
        here = self._stages.weights.experts
        mine = [slot for slot, expert in enumerate(here) if expert in experts]
        if not mine:
            return
        checkpoint, config = Checkpoint(path), self._stages.config
        memory = {here[slot]: checkpoint.matrix_format(layer, here[slot]) for slot in mine}
        blocks = self._stages.experts_of(layer)
        for expert, format in memory.items():
            if ACTIVATIONS[format] != blocks.activations:
                raise CheckpointError(
                    f"{checkpoint.path}: expert {expert} of layer {layer} is {format}, for activations in "
                    f"{ACTIVATIONS[format].value}; this engine's experts of the layer take {blocks.activations.value}"
                )
            check_tensors(checkpoint, routed_tensors(config, layer, expert, format))
        reader = ExpertReader(checkpoint, config, self._kernels, WeightMemory(self._kernels.device), self._converter)
        for kind in dict.fromkeys(MATRIX_KINDS[format] for format in memory.values()):
            self._check(kind)
            slots = [slot for slot in mine if MATRIX_KINDS[memory[here[slot]]] is kind]
            members = [here[slot] for slot in slots]
            with one_torch_thread():
                weights = reader.block(layer, members, [memory[expert] for expert in members])
            blocks = blocks.replaced(slots, weights)
        self._prepared[layer] = blocks

    def apply(self) -> None:
        """Puts what was prepared in place; no step may run."""
        for layer, blocks in self._prepared.items():
            self._own.setdefault(layer, self._stages.experts_of(layer))
            self._stages.replace_experts(layer, blocks)
        self._prepared.clear()

    def clear(self) -> None:
        """Puts the shard's own experts back; no step may run."""
        self._prepared.clear()
        for layer, blocks in self._own.items():
            self._stages.replace_experts(layer, blocks)
        self._own.clear()

    def _check(self, kind: type[ExpertMatrix]) -> None:
        if kind not in self._checked:
            self_check(self._kernels, check_shapes(self._stages.config, self._page_size), [kind])
            self._checked.add(kind)
