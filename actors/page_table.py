"""Which KV pages the sequences of a shard have: a row for each place that a sequence can have on the shard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PageTable:
    """page_size: in tokens. counts: [places] int64, how many pages each place has."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.counts = np.empty(0, np.int64)
        self._pages = np.empty((0, 0), np.int32)

    def add_places(self, places: int) -> None:
        """From now on there are so many, as many as before or more; a new one has no pages."""
        self.counts = np.pad(self.counts, (0, places - len(self.counts)))
        self._widen(self._pages.shape[1])

    def clear(self, place: int) -> None:
        """A place has no pages any more."""
        self._pages[place], self.counts[place] = -1, 0

    def put(self, place: int, kept: int, pages: Sequence[int]) -> None:
        """From the page `kept` on, a place has these, and none behind them."""
        count = kept + len(pages)
        if count > self._pages.shape[1]:
            self._widen(2 * count)
        self._pages[place, kept:count], self._pages[place, count : self.counts[place]] = pages, -1
        self.counts[place] = count

    def of(self, place: int, begin: int, end: int) -> np.ndarray:
        """[end - begin] int32, a place's pages begin..end, which it has; a view."""
        return self._pages[place, begin:end]

    def rows(self, places: np.ndarray) -> np.ndarray:
        """[S, W] int32, the pages of S places, behind them -1; W is the most that any of them has."""
        width = int(self.counts[places].max(initial=0))
        return self._pages[:, :width].take(places, axis=0)

    def slots(self, places: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[T] int64, where in the cache tokens stand, at [T] int64 positions for which their places, [T] or one for
        all, have pages."""
        pages, offsets = np.divmod(positions, self.page_size)
        return self._pages[places, pages].astype(np.int64) * self.page_size + offsets

    def _widen(self, width: int) -> None:
        wider = np.full((len(self.counts), width), -1, np.int32)
        wider[: self._pages.shape[0], : self._pages.shape[1]] = self._pages
        self._pages = wider
