"""One routed expert's matrix by itself, as the weight of a linear."""

from __future__ import annotations

import torch

from ...kernels.formats import join_nibbles, multiply_out
from ...kernels.protocol import ExpertMatrix, Fp8Matrix, Int4Matrix, Int8Matrix, Int8Weight, LinearWeight


def expert_weight(matrix: ExpertMatrix, expert: int) -> LinearWeight:
    """Expert number `expert` of a stack [E, N, K] -> its matrix [N, K], nothing of it rounded.

    Integer matrices stay integers (INT4 multiplied out), so that a linear over rows that came quantized gives what the
    routed experts' kernel sums: the same integers. FP8 becomes float32.
    """
    if isinstance(matrix, Int8Matrix):
        return Int8Weight(matrix.values[expert], matrix.scale[expert])
    if isinstance(matrix, Int4Matrix):
        values = multiply_out(join_nibbles(matrix.nibbles[expert]), matrix.multipliers[expert])
        return Int8Weight(values, matrix.scale[expert])
    if isinstance(matrix, Fp8Matrix):
        return matrix.values[expert].to(torch.float32) * matrix.scale[expert][:, None]
    return matrix.values[expert]
