"""GPTQ's error feedback: what rounding a column gets wrong is made up for in the columns that are not rounded yet.

After Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022. For inputs x with second moments H = sum of x xᵀ the output error of a row w rounded to q is
(w - q) H (w - q)ᵀ. With upper triangular U, UᵀU = H⁻¹, column i's error e = (w_i - q_i) / U_ii is carried into the
columns after it as w_j -= e U_ij. Scales are fixed before. Columns are taken from the largest mean square to the
smallest ("activation order"), which is free where scales do not depend on the order.

All in float32: against float64 throughout, at K = 2048 with moments over six decades, 0.3 % of the integers differ and
the output error is the same within 0.1 %.

N rows, K columns, moments in K / B diagonal blocks of B columns each; blocks do not know of each other and run side by
side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of a block's diagonal, added to the diagonal: GPTQ's own choice."""
DAMPING_FOR_FEW = 0.2
"""Of the same, for each column a token: moments of few tokens see directions without any error at all, and feedback
that trusts them is up to 1.25 times as wrong as none on other tokens. On correlated inputs of 256 columns, 0.1 to 0.3
made 16 to 65,536 tokens better than none, and lost nothing where tokens are many."""
ROW_GROUP = 256
"""Rows rounded at a time. Fixed, because the last bits of a matrix product depend on its shape, and a checkpoint must
not depend on how much memory a worker has."""
_FEW_COLUMNS = 8  # below this the columns are taken one by one; above, halves are joined by a matrix product


class MomentsError(ValueError):
    """Second moments that no error feedback can be worked out from."""


@dataclass(frozen=True)
class Factor:
    """What the feedback needs of the moments. order: [K/B, B] int64, a block's columns in the order they are rounded.
    upper: [K/B, B, B] float32, the upper triangular U of the columns in that order, UᵀU = H⁻¹ up to a factor."""

    order: Tensor
    upper: Tensor


class SecondMoments:
    """Sums of x xᵀ of the inputs of a matrix: blocks [K/B, B, B] float32, symmetric, of which the lower half is read.
    tokens: how many different inputs they are of, at least 1.

    factor: 4 K B bytes, so 205 MB for K = B = 7168, and four times that while it is worked out (it takes
    4/3 K B² operations); kept as long as this object.
    """

    def __init__(self, blocks: Tensor, tokens: int) -> None:
        if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2] or not blocks.is_floating_point():
            raise MomentsError(f"second moments are {blocks.dtype} {list(blocks.shape)}, expected float [K/B, B, B]")
        if tokens < 1:
            raise MomentsError(f"second moments of {tokens} tokens, expected at least 1")
        self.blocks = blocks
        self.tokens = tokens

    @property
    def columns(self) -> int:
        return self.blocks.shape[0] * self.blocks.shape[1]

    @cached_property
    def factor(self) -> Factor:
        """Raises MomentsError for moments that are not finite, or are no moments (negative, not positive definite)."""
        count, size, _ = self.blocks.shape
        order = torch.empty((count, size), dtype=torch.int64)
        upper = torch.empty((count, size, size), dtype=torch.float32)
        damping = DAMPING + DAMPING_FOR_FEW * size / self.tokens
        with one_torch_thread():
            for block, moments in enumerate(self.blocks):
                order[block], upper[block] = _factor(moments, damping, block * size)
        return Factor(order, upper)


def round_with_feedback(weight: Tensor, scale: Tensor, limits: tuple[int, int], moments: SecondMoments) -> Tensor:
    """weight [N, K] float32, scale [N, G] float32 for K / G columns each -> values [N, K] int8 within `limits`, half to
    even, 0 where the scale is 0. Runs on one torch thread; the result depends on the arguments alone.

    Raises MomentsError for moments of another number of columns.
    """
    if weight.shape[1] != moments.columns or weight.shape[1] % scale.shape[1]:
        raise MomentsError(
            f"second moments of {moments.columns} columns and {scale.shape[1]} scales a row do not fit a weight of "
            f"{list(weight.shape)}"
        )
    values = torch.empty(weight.shape, dtype=torch.int8)
    with one_torch_thread():
        for first in range(0, weight.shape[0], ROW_GROUP):
            rows = slice(first, first + ROW_GROUP)
            values[rows] = _RowGroup(weight[rows], scale[rows], limits, moments.factor).rounded()
    return values


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Thousands of short operations: split over threads they gain nothing, and sums could depend on the split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _factor(moments: Tensor, damping: float, first_column: int) -> tuple[Tensor, Tensor]:
    """One block [B, B] -> order [B], upper [B, B]."""
    diagonal = moments.diagonal().float()
    mean = float(diagonal.double().mean())
    if not bool(moments.isfinite().all()) or bool((diagonal < 0).any()):
        raise MomentsError(f"second moments of columns from {first_column} on are negative or not finite")
    size = diagonal.shape[0]
    order = diagonal.argsort(descending=True, stable=True)
    if mean == 0:  # no input was ever other than 0: nothing to make up for
        return order, torch.eye(size)
    # A column that was always 0 gets the damping alone: it is rounded to the nearest, and nothing is carried from it.
    # (GPTQ's code sets its weights to 0, which is wrong for any text that does reach it.)
    backwards = order.flip(0)
    turned = moments[backwards][:, backwards].float() / mean
    turned.diagonal().add_(damping)
    # H = R Rᵀ with R upper triangular is the Cholesky factorization from the last column to the first; then U = R⁻¹.
    lower, failed = torch.linalg.cholesky_ex(turned)
    if int(failed):
        raise MomentsError(f"second moments of columns from {first_column} on are not positive definite")
    del turned  # 205 MB of a large model's
    inverse = torch.linalg.solve_triangular(lower, torch.eye(size), upper=False)
    return order, inverse.flip(0, 1)


class _RowGroup:
    """Some rows, transposed and in the order of rounding: [K/B, B, n], so that a column lies in one piece."""

    def __init__(self, weight: Tensor, scale: Tensor, limits: tuple[int, int], factor: Factor) -> None:
        blocks, size = factor.order.shape
        columns = factor.order + torch.arange(blocks).unsqueeze(1) * size
        self._columns = columns.flatten()
        self._upper = factor.upper
        self._limits = limits
        self._weight = weight.T[self._columns].unflatten(0, (blocks, size))
        self._scale = scale.T.contiguous()
        self._scale_of = columns // (weight.shape[1] // scale.shape[1])
        self._values = torch.empty_like(self._weight)
        self._errors = torch.empty_like(self._weight)

    def rounded(self) -> Tensor:
        """-> [n, K] int8."""
        self._round(0, self._weight.shape[1])
        values = torch.empty((self._columns.shape[0], self._weight.shape[2]), dtype=torch.int8)
        values[self._columns] = self._values.flatten(0, 1).to(torch.int8)
        return values.T

    def _round(self, first: int, end: int) -> None:
        if end - first <= _FEW_COLUMNS:
            for column in range(first, end):
                self._round_column(column, end)
            return
        middle = (first + end) // 2
        self._round(first, middle)
        carried = self._upper[:, first:middle, middle:end].mT
        self._weight[:, middle:end].baddbmm_(carried, self._errors[:, first:middle], alpha=-1)
        self._round(middle, end)

    def _round_column(self, column: int, end: int) -> None:
        weight, scale = self._weight[:, column], self._scale[self._scale_of[:, column]]
        divisor = torch.where(scale > 0, scale, torch.inf)
        values = (weight / divisor).round_().clamp_(*self._limits)
        error = (weight - values * scale).div_(self._upper[:, column, column, None])
        self._values[:, column], self._errors[:, column] = values, error
        after = self._upper[:, column, column + 1 : end, None]
        self._weight[:, column + 1 : end].sub_(after * error.unsqueeze(1))
