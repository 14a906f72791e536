"""A linear's weight in 8 bits, made of one in floats."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.formats import quantize_int8_rows
from ...kernels.protocol import Int8Weight

# Values that are converted at once: their temporaries stay in the cache, and count for nothing beside the weights.
_VALUES = 1 << 18


def to_int8(name: str, weight: Tensor) -> Int8Weight:
    """weight [N, K] float -> one scale a row, absmax / 127, half to even: what `flyray quantize` writes as w8a8.

    Raises ValueError with `name` for values that are not finite.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = max(1, _VALUES // weight.shape[1])
    for begin in range(0, weight.shape[0], step):
        rows = slice(begin, begin + step)
        try:
            values[rows], scale[rows] = quantize_int8_rows(weight[rows])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return Int8Weight(values, scale)
