"""Stop strings in a stream of text, also across the borders of its pieces."""

from __future__ import annotations


class StopStrings:
    """Lets text through up to the first stop string, and holds back an end that may become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is now known to stand before any stop string. After one was found: nothing more."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        # A stop string is found when its last character comes. Of several that end there the longest began first.
        begins = [(begin + len(stop), begin) for stop in self._stops if (begin := self._held.find(stop)) >= 0]
        if begins:
            self.found = True
            return self._take(min(begins)[1])
        return self._take(len(self._held) - self._open_end())

    def finish(self) -> str:
        """The stream's end: what was held back is text after all."""
        return self._take(len(self._held)) if not self.found else ""

    def _open_end(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken
