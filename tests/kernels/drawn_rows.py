"""Rows of logits to draw from, and how: drawn by hypothesis, for every backend that draws."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from kernel_cases import normal

from flyray.kernels.protocol import SamplingRow

ROWS = st.builds(
    SamplingRow,
    temperature=st.sampled_from([0.0, 1e-40, 0.01, 0.7, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01, 1e-9]),
    top_k=st.sampled_from([0, 1, 3, 50, 10**30]),
    seed=st.integers(0, 2**70),
    position=st.integers(0, 1000),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    top_logprobs=st.sampled_from([0, 1, 5, 20]),
)


@st.composite
def logits_and_rows(draw: st.DrawFn) -> tuple[torch.Tensor, list[SamplingRow]]:
    """Of one to four rows: ties, forbidden tokens and both zeros too."""
    rows = draw(st.lists(ROWS, min_size=1, max_size=4))
    vocabulary, spread = draw(st.sampled_from([1, 2, 16, 17, 100, 1003])), draw(st.sampled_from([0.1, 1.0, 50.0]))
    logits = normal(draw(st.integers(0, 99)), len(rows), vocabulary) * spread
    kind = draw(st.sampled_from(["as it is", "with ties", "with forbidden tokens", "with both zeros"]))
    if kind == "with ties":
        logits = (logits * 2).round() / 2
    elif kind == "with forbidden tokens":
        logits[:, 1::2] = -torch.inf
    elif kind == "with both zeros":
        logits[:, ::3], logits[:, 1::3] = -0.0, 0.0
    return logits, rows
