"""Operations of a captured graph that run beside those after them, on a stream forked and joined in the capture.

**Memory.** In a capture torch gives a tensor's memory, once nobody holds it, to the next tensor made on the same
stream, whatever other streams still do with it. What the main stream made and a branch reads must therefore be held
till the join: `Branches` holds the branch's function until then, and so all that it reads. What a branch made and
dropped goes to its own stream's next tensor, behind it in order. What it gave back is dropped, at the earliest, when
its readers behind the join have been recorded, and goes to a later branch, whose fork waits for them. So nothing need
be recorded as used by two streams, which would keep its memory from all others until the capture ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

BRANCH_ROWS = 256
"""An estimate, not yet timed: the shared expert's launches are 30 us of latency at one row; with hundreds of rows they
and the routed experts keep the same units busy."""


class Branches:
    """Those of one backend's graphs, which one thread at a time captures. Outside of a capture nothing runs beside:
    there the host launches one operation after another, more slowly than the device runs them."""

    def __init__(self, device: torch.device) -> None:
        """device: a GPU; any other has no streams, and so no branches."""
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._open: list[Callable[[], object]] = []

    def run(self, run: Callable[[], T]) -> T:
        """Calls `run`, whose operations are behind those before them, and those after them wait for them at `join`."""
        if self._side is None or not torch.cuda.is_current_stream_capturing():
            return run()
        self._open.append(run)
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            return run()

    def join(self) -> None:
        """What begins from now on is behind all branches."""
        if self._side is not None and self._open:
            torch.cuda.current_stream().wait_stream(self._side)
            self._open.clear()


__all__ = ["BRANCH_ROWS", "Branches"]
