"""Recording and replaying the CPU library's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from .arena import Arena
from .handle import CpuHandle

R = TypeVar("R")


class Recording:
    """What one capture has seen: the operations' words, and the tensors from elsewhere that they read and write."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.words: list[bytes] = []
        self.kept: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> None:
        """Holds a tensor that is not the arena's: its address is in the words."""
        if tensor not in self.arena:
            self.kept[id(tensor)] = tensor


class CpuGraph(Generic[R]):
    """`Graph` of the CPU backend: one call of the library runs all operations. commands: their words."""

    def __init__(self, handle: CpuHandle, arena: Arena, run: Callable[[], R]) -> None:
        self.arena = arena
        self._handle = handle
        recording = Recording(arena)
        with handle.recording(recording):
            self.result = run()
        self.commands = b"".join(recording.words)
        self._kept = tuple(recording.kept.values())
        self.replay()

    def replay(self) -> None:
        """Runs the operations again; a ValueError for indices that point outside their tensors."""
        self._handle.run(self.commands)
