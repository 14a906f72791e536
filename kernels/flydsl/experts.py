"""The routed experts by FlyDSL products, with Triton's sorting of pairs before and its rounding between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..protocol import ActivationFormat, Activations
from ..triton.grouping import PairBlocks, group_pairs
from ..triton.quantize import quantize
from .layout import WaveExperts, WaveMatrix
from .shape import BLOCKS, FEW, NOWHERE, ProductShape

Launcher = Callable[..., object]
"""What `launch.product` gives: the arguments of `product.product_launcher`'s function, on the current stream."""
_FEW_PAIRS = 64
"""Up to so many pairs, and two an expert, more waves for each expert's rows gain more than larger blocks."""
_REGIMES = ((16, 16), (96, 64))
"""Up to so many pairs an expert on average, blocks of so many; above, of 128."""


def blocks_of(pair_expert: Tensor, weights: WaveExperts) -> PairBlocks:
    """pair_expert [P] int32, at least one -> its blocks."""
    pairs, experts = pair_expert.shape[0], weights.gate_up.experts
    if pairs <= weights.alone.shape[0]:
        return PairBlocks(weights.alone[:pairs].flatten(), pair_expert, FEW)
    return group_pairs(pair_expert, experts, block_size(pairs, experts))


def block_size(pairs: int, experts: int) -> int:
    """Of the blocks that so many pairs of so many experts are sorted into."""
    if pairs <= min(_FEW_PAIRS, 2 * experts):
        return FEW
    return next((size for most, size in _REGIMES if pairs <= most * experts), 128)


def run_experts(
    x: Activations,
    pair_token: Tensor,
    pair_expert: Tensor,
    weights: WaveExperts,
    launcher: Callable[[ProductShape], Launcher],
) -> Tensor:
    """`Kernels.experts`: INT8 rows x [T, D], pair_token and pair_expert [P] int32, at least one pair -> [P, D] float32.
    Rows of pairs of unknown experts are not written."""
    blocks = blocks_of(pair_expert, weights)
    hidden = _multiply(x, weights.gate_up, pair_token, blocks, launcher)
    return _multiply(quantize(hidden, ActivationFormat.INT8), weights.down, pair_token, blocks, launcher)


def warm_up(weights: WaveExperts, launcher: Callable[[ProductShape], Launcher]) -> None:
    """Launches every product of these weights on one block of no expert, which writes nothing."""
    device = weights.gate_up.words.device
    pair, scale = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, device=device)
    for matrix in (weights.gate_up, weights.down):
        x = Activations(ActivationFormat.INT8, torch.zeros((1, matrix.inner), dtype=torch.int8, device=device), scale)
        for size in BLOCKS:
            order = torch.ones(size, dtype=torch.int32, device=device)
            _multiply(x, matrix, pair, PairBlocks(order, pair - 1, size), launcher)


def _multiply(
    x: Activations,
    matrix: WaveMatrix,
    pair_row: Tensor,
    blocks: PairBlocks,
    launcher: Callable[[ProductShape], Launcher],
) -> Tensor:
    """pair_row: the row of x of every pair, where the product is gated, else it is the pair's own."""
    if x.values.nbytes > NOWHERE:
        raise ValueError(
            f"experts: {x.values.shape[0]} rows of {matrix.inner} bytes, more than {NOWHERE} bytes at once"
        )
    pairs, rows = pair_row.shape[0], matrix.rows // 2 if matrix.gated else matrix.rows
    shape = ProductShape(matrix.bits, matrix.inner, rows, matrix.units, matrix.gated, blocks.size)
    out = torch.empty((pairs, rows), dtype=torch.float32, device=x.values.device)
    words = matrix.words.flatten()
    launcher(shape)(
        words, words if matrix.multipliers is None else matrix.multipliers.flatten(), matrix.scale.flatten(),
        x.values.flatten().view(torch.int32), x.scale, pair_row, blocks.order, blocks.expert, out.flatten(),
        pairs, matrix.experts, x.values.nbytes, blocks.expert.shape[0],
    )  # fmt: skip
    return out


__all__ = ["Launcher", "run_experts", "warm_up"]
