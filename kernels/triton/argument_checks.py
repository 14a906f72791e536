"""What the GPU backend checks beyond what all backends do: tiled weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import ArgumentChecks, PairShapes
from ..protocol import ActivationFormat, Activations, Bf16Matrix, Fp8Matrix
from .layouts import TiledExperts


class TritonChecks(ArgumentChecks):
    """`ArgumentChecks` with those of `TiledExperts`."""

    def tiled_experts(
        self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: TiledExperts
    ) -> PairShapes:
        """The sizes of one `experts` call; a ValueError where the rows do not fit the weights."""
        gate_up, down = weights.gate_up, weights.down
        tokens = self._shape("experts", "x.values", x.values, 2)[0]
        wanted = ActivationFormat.FP8 if gate_up.kind is Fp8Matrix else ActivationFormat.INT8
        self._activations(x, ActivationFormat.FLOAT if gate_up.kind is Bf16Matrix else wanted, tokens, gate_up.inner)
        pairs = self._shape("experts", "pair_token", pair_token, 1)[0]
        self._require("experts", "pair_token", pair_token, (torch.int32,), (pairs,))
        self._require("experts", "pair_expert", pair_expert, (torch.int32,), (pairs,))
        return PairShapes(tokens, pairs, gate_up.experts, down.rows, down.inner)


__all__ = ["TritonChecks"]
