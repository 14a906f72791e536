"""Steps that clients asked an engine to record: those from a query on, handed over once all of them are there."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import StatusQuery, TracedStep
from .step_plan import StepResult

LONGEST_TRACE = 1000


@dataclass
class Recording:
    """A recording that a client asked for.

    left: steps still to be sent for it. pending: those on their way. steps: what came back.
    """

    client: bytes
    query: StatusQuery
    left: int
    pending: set[int] = field(default_factory=set)
    steps: list[TracedStep] = field(default_factory=list)


class Recordings:
    """All that are not answered yet."""

    def __init__(self) -> None:
        self._open: list[Recording] = []

    @property
    def wanted(self) -> bool:
        """Whether the next step is to be recorded."""
        return any(recording.left for recording in self._open)

    def begin(self, client: bytes, query: StatusQuery) -> None:
        """Records the next `query.trace_steps` steps, at most LONGEST_TRACE."""
        self._open.append(Recording(client, query, min(query.trace_steps, LONGEST_TRACE)))

    def sent(self, step: int) -> None:
        """A step that runs sequences is on its way."""
        for recording in self._open:
            if recording.left:
                recording.left -= 1
                recording.pending.add(step)

    def completed(self, step: int, results: list[StepResult]) -> list[Recording]:
        """Adds a step to the recordings that it belongs to; returns, and forgets, those that are complete."""
        done = []
        for recording in [recording for recording in self._open if step in recording.pending]:
            recording.pending.remove(step)
            recording.steps.extend(TracedStep(step, result.shard, result.stages) for result in results)
            if not recording.left and not recording.pending:
                self._open.remove(recording)
                done.append(recording)
        return done

    def end(self) -> list[Recording]:
        """Returns, and forgets, all as far as they came."""
        ended, self._open = self._open, []
        return ended
