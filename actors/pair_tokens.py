"""Which token each (token, slot) pair of a step is of."""

from __future__ import annotations

import torch
from torch import Tensor

# Of more tokens the numbers are made anew each time: the step computes for so long that it does not count.
_KEPT_TOKENS = 1024


class PairTokens:
    """Kept for good, for a graph that records a use goes on reading it, and need not make it in every run."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, torch.device], Tensor] = {}

    def of(self, tokens: int, slots: int, device: torch.device) -> Tensor:
        """[tokens * slots] int32: 0 for each slot of the first token, 1 of the second. Not to be written."""
        found = self._kept.get((tokens, slots, device))
        if found is None:
            found = torch.arange(tokens, dtype=torch.int32, device=device).repeat_interleave(slots)
            if tokens <= _KEPT_TOKENS:
                self._kept[tokens, slots, device] = found
        return found
