"""The reference on an accelerator: what everything beside the kernels is checked with there, to the bit."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .protocol import Drawn, T
from .reference import ReferenceKernels
from .sampling import draw


class TorchKernels(ReferenceKernels):
    """`ReferenceKernels` on a torch device: the same bits as on the CPU, by many small operations."""

    name = "torch"
    leaves_out = False

    def draw(self, logits: Tensor, words: Tensor) -> Drawn:
        return draw(logits, words)

    def branch(self, rows: int, run: Callable[[], T]) -> T:
        """All operations run in their order."""
        return run()

    def join(self) -> None: ...
