"""GPTQ in float64 NumPy, column by column and without blocks or Cholesky factors: optimal brain surgery's own formulas.

After rounding column i the best change of the rest is along row i of H⁻¹, and column i leaves H⁻¹ by a rank-1 update.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rounded_with_feedback(
    weight: Array, scale: Array, limits: tuple[int, int], moments: Array, damping: float
) -> tuple[Array, Array]:
    """weight [N, K], scale [N, K] (one for every weight), moments [K, K] of one block -> values [N, K], and [N], how
    close a row came to a tie (in steps): below float32's precision such a row may as well be rounded otherwise."""
    weight = weight.copy()
    mean = moments.diagonal().mean()
    damped = moments + np.eye(len(moments)) * (damping * mean if mean else 1.0)
    inverse = np.linalg.inv(damped)
    values, margin = np.zeros_like(weight), np.full(len(weight), np.inf)
    for column in np.argsort(-moments.diagonal(), kind="stable"):
        step = np.where(scale[:, column] > 0, scale[:, column], np.inf)
        ratio = weight[:, column] / step
        values[:, column] = np.clip(np.round(ratio), *limits)
        ties = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5)
        margin = np.minimum(margin, ties)
        error = weight[:, column] - values[:, column] * scale[:, column]
        weight -= np.outer(error / inverse[column, column], inverse[column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        # What is left of the column is noise that must not come back.
        inverse[column], inverse[:, column] = 0.0, 0.0
    return values, margin
