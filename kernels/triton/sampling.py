"""Sampling on the device: at once by `drawing`, or, of rows with changes or top_logprobs, by small operations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..protocol import Sampled, SamplingRow
from ..sampling import SamplingRows, check_sampling, sample
from .drawing import draw


def sample_rows(logits: Tensor, rows: list[SamplingRow]) -> Sampled:
    """`Kernels.sample`. Waits for the device once, to refuse rows whose largest logit is no finite number; rows with
    changes or top_logprobs make it wait more often."""
    check_sampling(logits, rows)
    if not rows or any(row.changes is not None or row.top_logprobs for row in rows):
        return sample(logits, rows)
    drawn = draw(logits, SamplingRows(rows).words.to(logits.device, non_blocking=True))
    finite = drawn.largest.isfinite()
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"sample: the largest of logits row {index} is {float(drawn.largest[index])}, expected a finite number"
        )
    nothing = torch.empty((len(rows), 0), dtype=torch.int64, device=logits.device)
    return Sampled(drawn.tokens, drawn.logprobs, nothing, nothing.to(torch.float32))


__all__ = ["sample_rows"]
