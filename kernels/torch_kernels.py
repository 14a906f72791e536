"""The reference on an accelerator: what everything beside the kernels is checked with there, to the bit."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .protocol import Greedy, T
from .reference import ReferenceKernels
from .sampling import greedy


class TorchKernels(ReferenceKernels):
    """`ReferenceKernels` on a torch device: the same bits as on the CPU, by many small operations."""

    name = "torch"
    leaves_out = False

    def greedy(self, logits: Tensor) -> Greedy:
        return greedy(logits)

    def branch(self, rows: int, run: Callable[[], T]) -> T:
        """All operations run in their order."""
        return run()

    def join(self) -> None: ...
