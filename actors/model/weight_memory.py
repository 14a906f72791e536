"""Where a shard's weights and its cache lie: in large blocks, on the CPU of huge pages.

Weights lie one behind another, so that no huge page is half empty but a block's last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels.huge_pages import huge_block

_BLOCK = 256 << 20  # of addresses: memory is taken as it is written
_ALIGNMENT = 64


class WeightMemory:
    """Uninitialized tensors on a device that live as long as somebody holds one of their block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._block = torch.empty(0, dtype=torch.uint8)

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous tensor, aligned to a cache line."""
        size = math.prod(shape) * dtype.itemsize
        if self.device.type != "cpu" or not size:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if size > len(self._block):
            self._block = huge_block(max(size, _BLOCK))
        part, self._block = self._block[:size], self._block[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return part.view(dtype).view(shape)

    def zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """The same with zeros, in a block of its own: on the CPU what is never written takes no memory."""
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        size = math.prod(shape) * dtype.itemsize
        return huge_block(size)[:size].view(dtype).view(shape)
