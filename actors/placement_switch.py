"""Which change of experts' places the plans name, and since which step all shards run with it."""

from __future__ import annotations


class PlacementSwitch:
    """named: the change that plans name; done: the last one with which a step was run. 0: none yet."""

    def __init__(self) -> None:
        self.named = self.done = 0
        self._first = -1

    def sent(self, step: int) -> None:
        """A step leaves whose plans name the change."""
        if self.named != self.done and self._first < 0:
            self._first = step

    def ended(self, step: int) -> None:
        """All shards have run a step."""
        if step == self._first:
            self.settle()

    def settle(self) -> None:
        """All shards have the change that plans name."""
        self.done, self._first = self.named, -1
