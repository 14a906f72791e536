"""When the plan of the step after the running one leaves the router."""

from __future__ import annotations

from collections import defaultdict, deque

# The share of the shortest like step for which a plan is held, and what the plan then needs to reach the shards.
HELD_SHARE = 0.8
MARGIN_S = 0.002
# Steps that count as recent.
RECENT_STEPS = 16


class StepPace:
    """Holds the next step's plan back while a step runs, so that requests that come meanwhile are in it.

    Planned at once, a step lacks what arrives while the one before it runs, and a new request waits for a whole step
    more. The measure is the shortest of the recent steps of about as many tokens, those of the shard that has the most:
    a step that takes longer only has its successor planned earlier than it could be, and shards never wait for a plan
    unless steps become shorter by more than a fifth.
    """

    def __init__(self) -> None:
        self._recent: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT_STEPS))

    def took(self, tokens: int, seconds: float) -> None:
        """Takes in how long a step ran."""
        self._recent[tokens.bit_length()].append(seconds)

    def wait(self, tokens: int, elapsed: float) -> float:
        """Seconds that the next plan is still to be held when the running step began `elapsed` seconds ago; 0 when it
        is to leave."""
        held = HELD_SHARE * min(self._recent[tokens.bit_length()], default=0.0) - MARGIN_S
        return max(0.0, held - elapsed)
