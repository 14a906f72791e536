"""Gathers activation statistics of a shard's routed experts while it runs.

For each expert: how many tokens came to it, and of its input and of the input of its down_proj every channel's largest
magnitude and sum of squares; if asked for, second moments in diagonal blocks. The kernels keep the inner activations
to themselves, so they are computed once more here. Rows do not depend on what runs beside them, so counts and largest
magnitudes are the same for any batch, chunks and shards, and sums differ by their order in float64 alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.protocol import Activations, Kernels
from .exchange import Received
from .model.expert_blocks import ExpertBlocks
from .model.expert_weight import expert_weight
from .statistics_writer import LayerSums, ShardStatistics

# Rows of float64 that are made at once: 1024 rows of 7168 columns are 59 MB.
_ROWS = 1024


class Collector:
    """Adds what runs through a shard's experts to its statistics. tokens: of the shard's own sequences, counted by
    whoever runs the steps."""

    def __init__(self, statistics: ShardStatistics, kernels: Kernels) -> None:
        self.tokens = 0
        self._statistics, self._kernels = statistics, kernels

    def add(self, layer: int, received: Received, experts: ExpertBlocks) -> None:
        """One layer's pairs of one step, as `ModelStages.experts` runs them."""
        sums = self._statistics.layer(layer)
        rows = _float_rows(received.activations)
        if sums.input_moments is not None:
            times = torch.bincount(received.pair_token, minlength=len(rows))
            _add_moments(sums.input_moments, rows, times)
        order = received.pair_expert.argsort(stable=True)
        counts = torch.bincount(received.pair_expert, minlength=len(experts))
        sums.count.add_(counts.cpu())
        reached = counts.nonzero()[:, 0].tolist()
        for expert, pairs in zip(reached, order.split(counts[counts > 0].tolist()), strict=True):
            self._add_expert(sums, expert, rows[received.pair_token[pairs]], experts)

    def finish(self) -> int:
        """Flushes everything to the disk; returns the tokens. Raises StatisticsError."""
        self._statistics.flush()
        return self.tokens

    def _add_expert(self, sums: LayerSums, expert: int, rows: Tensor, experts: ExpertBlocks) -> None:
        _add_channels(sums.input_absmax[expert], sums.input_energy[expert], rows)
        weights, number = experts.find(expert)
        inner = self._kernels.silu_mul(self._kernels.linear(rows, expert_weight(weights.gate_up, number)))
        _add_channels(sums.inner_absmax[expert], sums.inner_energy[expert], inner)
        if sums.inner_moments is not None:
            _add_moments(sums.inner_moments[expert], inner)


def _float_rows(activations: Activations) -> Tensor:
    """[R, D] float32, as the experts multiply them: what they were quantized to."""
    values = activations.values.to(torch.float32)
    return values if activations.scale is None else values * activations.scale[:, None]


def _add_channels(absmax: Tensor, energy: Tensor, rows: Tensor) -> None:
    """absmax [K] float32 and energy [K] float64 take in rows [n, K] float32; squares are exact in float64."""
    torch.maximum(absmax, rows.abs().amax(0).cpu(), out=absmax)
    for part in rows.split(_ROWS):
        energy += part.double().square_().sum(0).cpu()


def _add_moments(moments: Tensor, rows: Tensor, times: Tensor | None = None) -> None:
    """moments [K/B, B, B] float64 takes in the diagonal blocks of rows' [n, K] second moments, each row `times` [n]."""
    blocks, block, _ = moments.shape
    for begin in range(0, len(rows), _ROWS):
        cut = rows[begin : begin + _ROWS].double().unflatten(1, (blocks, block)).movedim(0, 1)
        weighted = cut if times is None else cut * times[begin : begin + _ROWS, None]
        moments += (cut.mT @ weighted).cpu()
