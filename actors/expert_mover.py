"""Experts that come to a running shard: read beside its steps, put in place between two of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..kernels.protocol import LayerExperts
from .expert_placement import LayerPlacement
from .expert_routes import ExpertRoutes
from .expert_source import ReadExpert
from .model.stages import ModelStages

_SETTLING = 0
"""The number of no change: they begin with 1."""


@dataclass(frozen=True)
class _Staged:
    """What is to change at once. experts: by the slot that each is for."""

    layer: int
    placement: LayerPlacement
    experts: dict[int, LayerExperts]


class ExpertMover:
    """One shard's. Weights and tables are overwritten where they lie, so what was captured with them stays right.

    `stage` and `discard` are called from one thread, `apply` from that of the steps. longest_s: seconds that the
    longest `apply` kept a step waiting (on a device: the host alone).
    """

    def __init__(self, stages: ModelStages, routes: ExpertRoutes, read: ReadExpert) -> None:
        self.longest_s = 0.0
        self._stages, self._routes, self._read = stages, routes, read
        self._staged: dict[int, _Staged] = {}
        self._stream: torch.Stream | None = None
        self._reading = threading.Lock()

    def stage(self, version: int, layer: int, placement: LayerPlacement) -> None:
        """Reads those experts that the shard does not have where the placement wants them. Steps may run meanwhile.

        Raises CheckpointError or ValueError; then nothing is kept.
        """
        mine, now = (each.held[self._routes.shard] for each in (placement, self._routes.placement(layer)))
        with self._reading, self._beside_steps():
            changed = [slot for slot, expert in enumerate(mine) if expert != now[slot]]
            experts = {slot: self._read(layer, mine[slot]) for slot in changed}
        self._staged[version] = _Staged(layer, placement, experts)

    def discard(self, version: int) -> None:
        """Forgets what `stage` read, if it did."""
        self._staged.pop(version, None)

    def apply(self, version: int) -> None:
        """Puts a staged layer in place; the next stage runs it. Raises KeyError where none is staged."""
        begin = time.perf_counter()
        staged = self._staged.pop(version)
        blocks = self._stages.experts_of(staged.layer)
        for slot, expert in staged.experts.items():
            blocks.put(slot, expert)
        self._routes.place(staged.layer, staged.placement)
        self.longest_s = max(self.longest_s, time.perf_counter() - begin)

    def settle(self, moved: Sequence[tuple[int, LayerPlacement]]) -> None:
        """While no step runs: brings these layers to where they are in the other shards; what is staged is forgotten.
        Raises what `stage` does."""
        for layer, placement in moved:
            if self._routes.placement(layer) != placement:
                self.stage(_SETTLING, layer, placement)
                self.apply(_SETTLING)
        self._staged.clear()

    @contextmanager
    def _beside_steps(self) -> Iterator[None]:
        """On a device, in a stream of its own, which is done at the end."""
        device = self._routes.device
        if device.type == "cpu":
            yield
            return
        torch.accelerator.set_device_index(device.index)  # each thread has a current device
        # One for good: memory that was read into is taken again in this stream alone, when the step that copied it to
        # its place is long done.
        self._stream = self._stream or torch.Stream(device)
        with self._stream:
            yield
        self._stream.synchronize()
