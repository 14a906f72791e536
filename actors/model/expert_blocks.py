"""The routed experts of one layer that a shard holds, in blocks of one kind of matrix each.

The kernels run experts of one kind at a time. A layer whose experts are in several formats has a block for each kind;
which block runs a pair does not change a bit of its result, for a row depends on nothing beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...kernels.protocol import (
    ActivationFormat,
    Activations,
    ExpertWeights,
    Kernels,
    LayerExperts,
    activation_format,
    matrix_kind,
)


@dataclass(frozen=True)
class ExpertBlocks:
    """E experts, by local numbers: a shard's slots, from 0 on.

    blocks: at least one; all multiply one activation format. block: [E] int64, the block that holds each expert.
    place: [E] int32, its number there; ascending with the expert, so that in a single block it is the expert's own.
    """

    blocks: tuple[LayerExperts, ...]
    block: Tensor
    place: Tensor

    @staticmethod
    def of(blocks: Sequence[tuple[Sequence[int], LayerExperts]], device: torch.device) -> ExpertBlocks:
        """blocks: local experts, ascending, and their weights in that order; together 0..E-1, each once."""
        members = [list(experts) for experts, _ in blocks]
        count = sum(map(len, members))
        if sorted(expert for experts in members for expert in experts) != list(range(count)):
            raise ValueError(f"blocks of experts {members} do not hold each of {count} experts once")
        block = torch.empty(count, dtype=torch.int64)
        place = torch.empty(count, dtype=torch.int32)
        for number, experts in enumerate(members):
            if experts != sorted(experts):
                raise ValueError(f"a block's experts must be in ascending order, are {experts}")
            block[experts] = number
            place[experts] = torch.arange(len(experts), dtype=torch.int32)
        return ExpertBlocks(tuple(each for _, each in blocks), block.to(device), place.to(device))

    def __len__(self) -> int:
        return len(self.block)

    @property
    def activations(self) -> ActivationFormat:
        """What the experts multiply."""
        return activation_format(self.blocks[0].gate_up)

    @property
    def prepared(self) -> bool:
        """Whether a backend has laid any block out anew, so that nobody else can read its matrices."""
        return not all(isinstance(block, ExpertWeights) for block in self.blocks)

    @property
    def bytes(self) -> int:
        """Of all experts."""
        matrices = [matrix for block in self.blocks for matrix in (block.gate_up, block.down)]
        parts = [part for matrix in matrices for part in vars(matrix).values()]
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))

    def find(self, expert: int) -> tuple[ExpertWeights, int]:
        """Local expert -> the block that holds it, and its number there. Raises ValueError where it is `prepared`."""
        block = self.blocks[int(self.block[expert])]
        if not isinstance(block, ExpertWeights):
            raise ValueError(f"expert {expert} is in a backend's layout, {type(block).__name__}: it can only be run")
        return block, int(self.place[expert])

    def put(self, slot: int, expert: LayerExperts) -> None:
        """Overwrites the expert of a slot where it lies, for captured steps too, with the only one of `expert`.

        Raises ValueError unless there is one block, of the same kind and layout."""
        if len(self.blocks) != 1:
            raise ValueError(f"experts of {len(self.blocks)} kinds of matrix cannot take each other's place")
        for name in ("gate_up", "down"):
            target, source = getattr(self.blocks[0], name), getattr(expert, name)
            if type(target) is not type(source) or matrix_kind(target) is not matrix_kind(source):
                raise ValueError(f"{name} is {type(source).__name__}, the layer's experts have {type(target).__name__}")
            for field in fields(target):
                here, there = getattr(target, field.name), getattr(source, field.name)
                if isinstance(here, Tensor):
                    if there.shape != (1, *here.shape[1:]):
                        raise ValueError(
                            f"{name}.{field.name}: {tuple(there.shape)} is no expert of {tuple(here.shape)}"
                        )
                    here[slot].copy_(there[0])

    def run(self, kernels: Kernels, activations: Activations, pair_token: Tensor, pair_expert: Tensor) -> Tensor:
        """`Kernels.experts` over all blocks: pair_token [P] int32, pair_expert [P] int32 local -> [P, D] float32."""
        if len(self.blocks) == 1:
            return kernels.experts(activations, pair_token, pair_expert, self.blocks[0])
        block, place = self.block[pair_expert], self.place[pair_expert]
        hidden = activations.values.shape[1]
        outputs = torch.empty((len(pair_expert), hidden), dtype=torch.float32, device=pair_expert.device)
        for number, weights in enumerate(self.blocks):
            pairs = (block == number).nonzero()[:, 0]
            if len(pairs):
                outputs[pairs] = kernels.experts(activations, pair_token[pairs], place[pairs], weights)
        return outputs

    def replaced(self, experts: Sequence[int], weights: LayerExperts) -> ExpertBlocks:
        """With these local experts, ascending, taken from `weights`; blocks that hold nothing any more are left out."""
        if list(experts) != sorted(set(experts)):
            raise ValueError(f"experts must be in ascending order, each once, are {list(experts)}")
        block, place = self.block.clone(), self.place.clone()
        block[list(experts)] = len(self.blocks)
        place[list(experts)] = torch.arange(len(experts), dtype=place.dtype, device=place.device)
        used, block = block.unique(return_inverse=True)
        every = (*self.blocks, weights)
        return ExpertBlocks(tuple(every[number] for number in used.tolist()), block, place)
