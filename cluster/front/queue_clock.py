"""How long a full queue will take to clear, from how fast requests have left it."""

from __future__ import annotations

import math
from collections import deque

_REMEMBERED = 64
_OLDEST_S = 30.0
SHORTEST_S = 1
LONGEST_S = 120


class QueueClock:
    """Remembers when the last requests stopped waiting. Times are in seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._left: deque[float] = deque(maxlen=_REMEMBERED)

    def left(self, now: float) -> None:
        """A request waits no longer: its first token came, or it ended."""
        self._left.append(now)

    def seconds_for(self, waiting: int, now: float) -> int:
        """Whole seconds until `waiting` requests will have left, at the rate of the last half minute.

        At least 1 and at most 120; 1 while nothing is known.
        """
        while self._left and now - self._left[0] > _OLDEST_S:
            self._left.popleft()
        if not self._left:
            return SHORTEST_S
        seconds = waiting * (now - self._left[0]) / len(self._left)
        return min(max(math.ceil(seconds), SHORTEST_S), LONGEST_S)
