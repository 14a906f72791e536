"""Captured operations of the GPU: one launch replays them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from .branches import Branches

R = TypeVar("R")


class TritonGraph(Generic[R]):
    """`Graph` of a device graph (CUDA's or HIP's). `run` is called twice before it is recorded, so that kernels are
    compiled; what it writes must be the same each time."""

    def __init__(self, run: Callable[[], R], beside: TritonGraph[object] | None, branches: Branches) -> None:
        """branches: what `run` may fork; what it has not joined is joined at its end, for a capture has one end."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside._graph.pool()
        # Other threads may go on to copy weights to the device.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            try:
                self.result = run()
            finally:
                branches.join()
        self._graph.replay()

    def replay(self) -> None:
        """Runs the operations again on the current stream; does not wait for them."""
        self._graph.replay()


__all__ = ["TritonGraph"]
