"""Weights for the quantizer tests, all from seeds."""

from __future__ import annotations

import torch
from torch import Tensor


def heavy_tails(rows: int, columns: int, seed: int) -> Tensor:
    """Student-t3, some rows almost without tails, in several magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn(rows, columns, 3, generator=generator).square().sum(-1) / 3
    weight = torch.randn(rows, columns, generator=generator)
    weight[::2] /= chi[::2].sqrt()
    return weight * 10 ** (torch.rand(rows, 1, generator=generator) * 6 - 5)


def odd_weight(rows: int, columns: int, seed: int) -> Tensor:
    """As `heavy_tails`, with rows and groups of zeros, single huge values, subnormal rows and exact ties among them."""
    weight = heavy_tails(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for row in range(rows):
        kind, column = (int(i) for i in torch.randint(0, 1 << 20, (2,), generator=generator))
        column %= columns
        match kind % 8:
            case 0:
                weight[row] = 0.0
            case 1:
                weight[row, column] = 3e38
            case 2:
                weight[row] *= 1e-41
            case 3:
                weight[row, column // 32 * 32 : column // 32 * 32 + 32] = 0.0
            case 4:
                weight[row] = (weight[row] * 2 / weight[row].abs().amax() * 7).round() / 2
            case 5:
                weight[row] *= 1e-30
    return weight


def importance_of(columns: int, seed: int) -> Tensor:
    """Over six orders of magnitude, every fifth column without any."""
    generator = torch.Generator().manual_seed(seed + 2)
    importance = 10 ** (torch.rand(columns, generator=generator) * 6 - 3)
    importance[::5] = 0.0
    return importance


def folding_case(rows: int, groups: int, bfloat: bool, seed: int) -> tuple[Tensor, Tensor]:
    """values [rows, 32 * groups] int8 and group scales that can be folded: random and spread, with rows and groups of
    zeros, which may have any scale, scales of one huge group, tiny ones, and exact ratios."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (rows, 32 * groups), generator=generator, dtype=torch.int8)
    scale = torch.exp(torch.randn(rows, groups, generator=generator) * 0.4)
    for row in range(rows):
        kind, group = (int(i) for i in torch.randint(0, 1 << 20, (2,), generator=generator))
        group %= groups
        columns = slice(32 * group, 32 * group + 32)
        match kind % 7:
            case 0:
                values[row], scale[row, group] = 0, -1.0
            case 1:
                values[row, columns], scale[row, group] = 0, 0.0
            case 2:
                scale[row, group] = 1e30
            case 3:
                scale[row] *= 1e-37
            case 4:
                scale[row] = torch.randint(1, 16, (groups,), generator=generator) * 0.0078125
            case 5:
                values[row, columns] = torch.randint(0, 2, (32,), generator=generator, dtype=torch.int8)
    return values, scale.bfloat16() if bfloat else scale
