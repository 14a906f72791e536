"""Greedy rows of logits on the device: the largest logit, lowest id first, and its log probability.

Weights are the integers of `kernels/sampling.py`, so their sum is exact in any order. Rows that draw, change logits or
ask for more than one log probability run that module's own operations, on the logits' device.
"""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..protocol import Greedy, Sampled, SamplingRow
from ..sampling import WEIGHT_BITS, check_sampling, sample
from .arithmetic import ordered_exp

_BLOCK = 4096
_POWER = float(2**WEIGHT_BITS)
# 1.5 * 2^52: adding it rounds a float64 below 2^51 to an integer, half to even, which is left in its low bits.
_MAGIC = 6755399441055744.0


@triton.jit
def greedy_rows(logits, tokens, largest, weights, size, POWER: tl.constexpr, MAGIC: tl.constexpr, BLOCK: tl.constexpr):
    """One row of logits [size] a program: the id of its largest, that logit, and the sum of the weights, int64."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, size, BLOCK):
        value = tl.load(logits + row * size + begin + column, mask=begin + column < size, other=float("-inf"))
        broken = broken | (value != value).to(tl.int32)
        better = value > best
        place = tl.where(better, begin + column, place)
        best = tl.where(better, value, best)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, place, 2147483647), 0)
    top = tl.where(tl.max(broken, 0) > 0, float("nan"), top)
    total = tl.zeros((BLOCK,), tl.int64)
    for begin in range(0, size, BLOCK):
        inside = begin + column < size
        value = tl.load(logits + row * size + begin + column, mask=inside, other=float("-inf"))
        weight = ordered_exp(value - top).to(tl.float64) * POWER
        weight = (weight + MAGIC) - MAGIC
        total += tl.where(inside, weight, 0.0).to(tl.int64)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(largest + row, top)
    tl.store(weights + row, tl.sum(total, 0))


def sample_rows(logits: Tensor, rows: list[SamplingRow]) -> Sampled:
    """`Kernels.sample`. Waits for the device once, to refuse rows whose largest logit is no finite number."""
    check_sampling(logits, rows)
    plain = all(row.temperature == 0.0 and row.changes is None and row.top_logprobs == 0 for row in rows)
    if not plain or not rows:
        return sample(logits, rows)
    found = greedy(logits)
    finite = found.largest.isfinite()
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"sample: the largest of logits row {index} is {float(found.largest[index])}, expected a finite number"
        )
    nothing = torch.empty((len(rows), 0), dtype=torch.int64, device=logits.device)
    return Sampled(found.tokens, found.logprobs, nothing, nothing.to(torch.float32))


def greedy(logits: Tensor) -> Greedy:
    """`AheadKernels.greedy`."""
    count, device = logits.shape[0], logits.device
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    largest = torch.empty(count, dtype=torch.float32, device=device)
    weights = torch.empty(count, dtype=torch.int64, device=device)
    greedy_rows[(count,)](
        logits, tokens, largest, weights, logits.shape[1], _POWER, _MAGIC, _BLOCK, num_warps=8, enable_fp_fusion=False
    )
    logprobs = (-torch.log(weights.to(torch.float64) * 2.0**-WEIGHT_BITS)).to(torch.float32)
    return Greedy(tokens, logprobs, largest)


__all__ = ["greedy", "sample_rows"]
