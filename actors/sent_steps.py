"""The steps on their way to the shards: which one runs, since when, and when the next one is to follow."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .step_pace import StepPace

# Before a step ends the next one's plans are on their way already, so that shards never wait for the router.
STEPS_AHEAD = 2


@dataclass
class _Sent:
    """tokens: of the shard that has the most. begun: when it was sent, or when the one before it ended."""

    tokens: int
    begun: float


class SentSteps:
    """In the order in which they were sent, which is that of their numbers; the oldest one runs."""

    def __init__(self) -> None:
        self._steps: dict[int, _Sent] = {}
        self._pace = StepPace()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def oldest(self) -> int:
        """The step that runs; there must be one."""
        return next(iter(self._steps))

    @property
    def elapsed(self) -> float:
        """Seconds since the oldest step began."""
        return time.monotonic() - self._steps[self.oldest].begun

    @property
    def held(self) -> float:
        """Seconds for which the next plan is still held back."""
        return self._pace.wait(self._steps[self.oldest].tokens, self.elapsed) if self._steps else 0.0

    @property
    def full(self) -> bool:
        """Whether no more steps may be on their way."""
        return len(self._steps) >= STEPS_AHEAD

    def send(self, step: int, tokens: int) -> None:
        """Takes up a step that leaves now. tokens: of the shard that has the most."""
        self._steps[step] = _Sent(tokens, time.monotonic())

    def end(self) -> None:
        """The oldest step is done; one that was sent ahead begins."""
        ended, now = self._steps.pop(self.oldest), time.monotonic()
        self._pace.took(ended.tokens, now - ended.begun)
        for sent in self._steps.values():
            sent.begun = now

    def clear(self) -> None:
        """Forgets them: nothing runs any more."""
        self._steps.clear()
