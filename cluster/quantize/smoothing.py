"""Smoothing: channels with large activations are made smaller, and the weights that read them larger by as much.

After Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant", 2022, with two differences. The factors come from activations
alone, so that all readers of a layer's input (the router, shared and routed experts) share them without a look at their
weights. And they are powers of two: a bfloat16 or float32 tensor times such a factor is exact, so an unquantized model
gives the same sums before and after, bit for bit, and the router chooses the same experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_EXPONENT = 8
"""A channel that calibration hardly reached would get a factor without bound, and be the largest of all in other texts;
with an exponent of 0.5 this is met at 65,000 times the mean."""


def smoothing_factors(absmax: Tensor, exponent: float) -> Tensor:
    """absmax [K] float32, largest magnitudes of a matrix's input channels -> factors [K] float32 that the activations
    are to be divided by and the weights' columns multiplied with: 2^round(exponent * log2(absmax / geometric mean)).

    Channels that were always 0 get factor 1 and do not count in the mean. Raises ValueError for an exponent outside
    0..1, or magnitudes that are negative or not finite.
    """
    if not 0 <= exponent <= 1:
        raise ValueError(f"smoothing is {exponent}, expected an exponent of 0..1")
    if not bool((absmax.isfinite() & (absmax >= 0)).all()):
        raise ValueError("largest magnitudes of activations are negative or not finite")
    used = absmax > 0
    if not bool(used.any()):
        return torch.ones_like(absmax, dtype=torch.float32)
    logarithm = torch.where(used, absmax, 1.0).double().log2()
    mean = logarithm.sum() / used.sum()
    powers = (exponent * (logarithm - mean)).round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.where(used, powers, 0.0).exp2().float()
