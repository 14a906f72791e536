"""The steps on their way to the shards: which one runs, since when, who has answered it, and when the next follows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from .step_pace import StepPace
from .step_plan import StepResult

# Before a step ends the next one's plans are on their way already, so that shards never wait for the router.
STEPS_AHEAD = 2


@dataclass
class SentStep:
    """tokens: of the shard that has the most. begun: when it was sent, or when the one before it ended. results: of the
    shards that have answered."""

    number: int
    tokens: int
    program: str
    begun: float
    results: list[StepResult] = field(default_factory=list)


class SentSteps:
    """In the order in which they were sent, which is that of their numbers; the oldest one runs."""

    def __init__(self) -> None:
        self._steps: dict[int, SentStep] = {}
        self._pace = StepPace()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def oldest(self) -> SentStep:
        """The step that runs; there must be one."""
        return next(iter(self._steps.values()))

    @property
    def elapsed(self) -> float:
        """Seconds since the oldest step began."""
        return time.monotonic() - self.oldest.begun

    @property
    def held(self) -> float:
        """Seconds for which the next plan is still held back."""
        return self._pace.wait(self.oldest.tokens, self.elapsed) if self._steps else 0.0

    @property
    def full(self) -> bool:
        """Whether no more steps may be on their way."""
        return len(self._steps) >= STEPS_AHEAD

    def send(self, step: int, tokens: int, program: str) -> None:
        """Takes up a step that leaves now. tokens: of the shard that has the most."""
        self._steps[step] = SentStep(step, tokens, program, time.monotonic())

    def take(self, result: StepResult) -> bool:
        """Keeps a shard's result; False if its step is none of these."""
        sent = self._steps.get(result.step)
        if sent is not None:
            sent.results.append(result)
        return sent is not None

    def end(self, shards: int) -> SentStep | None:
        """The oldest step, once all shards have answered it; one that was sent ahead begins."""
        if not self._steps or len(self.oldest.results) < shards:
            return None
        ended, now = self._steps.pop(self.oldest.number), time.monotonic()
        self._pace.took(ended.tokens, now - ended.begun)
        for sent in self._steps.values():
            sent.begun = now
        return ended

    def clear(self) -> None:
        """Forgets them: nothing runs any more."""
        self._steps.clear()
