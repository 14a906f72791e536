"""Where a shard's weights lie: in large blocks, on the CPU of huge pages where the system has them to give.

A thread reads memory in pages of 2 MiB faster than in pages of 4 KiB, and whoever fills them first waits for 512 times
fewer page faults. Weights lie one behind another, so that no huge page is half empty but a block's last.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
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
            self._block = _huge_block(max(size, _BLOCK))
        part, self._block = self._block[:size], self._block[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return part.view(dtype).view(shape)


def _huge_block(size: int) -> Tensor:
    """At least `size` bytes, beginning with a huge page."""
    pages = mmap.mmap(-1, size + 2 * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a kernel without huge pages: small ones serve
            pages.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -block.data_ptr() % _HUGE_PAGE
    return block[begin : begin + -(-size // _HUGE_PAGE) * _HUGE_PAGE]
