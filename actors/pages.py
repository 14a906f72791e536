"""The KV pages of one shard: which are free, which are owned."""

from __future__ import annotations

from collections.abc import Iterable


class PageError(ValueError):
    """Pages that cannot be had, or are given back without being owned."""


class PageAllocator:
    """Hands out page numbers 0..num_pages - 1; `page_size` is in tokens.

    Deterministic: at first the lowest numbers, later the pages given back last, whose memory is the warmest.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise PageError(f"num_pages {num_pages} and page_size {page_size} must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._owned = bytearray(num_pages)

    @property
    def free_pages(self) -> int:
        """Number of pages nobody owns."""
        return len(self._free)

    @property
    def used_pages(self) -> int:
        """Number of pages handed out."""
        return self.num_pages - len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Number of pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> tuple[int, ...]:
        """`count` pages, all or none: raises `PageError` if fewer are free."""
        if count < 0:
            raise PageError(f"cannot allocate {count} pages")
        if count > len(self._free):
            raise PageError(f"{count} pages wanted, {len(self._free)} of {self.num_pages} are free")
        pages = tuple(self._free.pop() for _ in range(count))
        for page in pages:
            self._owned[page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Gives pages back. All or none: raises `PageError` if one is not owned or comes twice."""
        pages = tuple(pages)
        if len(set(pages)) != len(pages):
            raise PageError(f"pages {pages} given back name one twice")
        for page in pages:
            if not 0 <= page < self.num_pages or not self._owned[page]:
                raise PageError(f"page {page} is given back but not owned (pages are 0..{self.num_pages - 1})")
        for page in reversed(pages):
            self._owned[page] = 0
            self._free.append(page)
