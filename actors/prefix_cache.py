"""The KV pages of one shard by content: sequences that begin alike hold the same pages, and read what one has written.

A page is known by the hash of all tokens from the sequence's first to the page's last (`extend_keys`), so equal keys
mean equal keys and values: a row's bits depend on its tokens alone, never on the batch it ran in. Pages become known
when the step that fills them is scheduled, for steps run in order, and within one step keys and values are written
before any sequence reads them. A known page is full, and nobody writes it again.

Pages that nobody holds stay known until their room is wanted; then those go first that were given back first, and of
one sequence's the last first, so that what is left is still the beginning of something.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from .pages import PageAllocator, PageError

KEY_BYTES = 32


def extend_keys(keys: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Appends the keys of those full pages of `tokens` that have none in `keys` yet.

    A key is BLAKE2b over the key of the page before and the page's tokens, packed as int32 in this machine's byte
    order, for keys stay in the process.
    """
    parent = keys[-1] if keys else b""
    for end in range((len(keys) + 1) * page_size, len(tokens) + 1, page_size):
        content = parent + array("i", tokens[end - page_size : end]).tobytes()
        parent = hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
        keys.append(parent)


class PrefixCache:
    """Who holds each page of one shard, and which content is known. It owns all pages of `allocator`."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self._holders = [0] * allocator.num_pages
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        # Known pages that nobody holds, as keys only; those given back first come first.
        self._idle: dict[int, None] = {}

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds; `allocate` gives that many."""
        return self._allocator.free_pages + len(self._idle)

    @property
    def cached_pages(self) -> int:
        """Pages whose content is known, held or not."""
        return len(self._keys)

    def allocate(self, count: int) -> tuple[int, ...]:
        """`count` pages for one holder to write, all or none: raises `PageError` if fewer are free."""
        if count > self.free_pages:
            raise PageError(f"{count} pages wanted, {self.free_pages} of {self._allocator.num_pages} are free")
        while self._allocator.free_pages < count:
            page = next(iter(self._idle))
            del self._idle[page]
            self._forget(page)
            self._allocator.free((page,))
        pages = self._allocator.allocate(count)
        for page in pages:
            self._holders[page] = 1
        return pages

    def find(self, keys: Sequence[bytes]) -> tuple[int, ...]:
        """The known pages of the longest prefix of `keys`."""
        pages: list[int] = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder of each of these known pages."""
        for page in pages:
            if page not in self._keys:
                raise PageError(f"page {page} is to be shared, but its content is not known")
            self._idle.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each page, in the order of the sequence; what nobody holds any more is free."""
        for page in reversed(pages):
            if not self._holders[page]:
                raise PageError(f"page {page} is given back, but nobody holds it")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._allocator.free((page,))

    def freed_by(self, pages: Iterable[int]) -> int:
        """How many of a holder's pages would be free if it gave them back."""
        return sum(self._holders[page] == 1 for page in pages)

    def idle_among(self, pages: Iterable[int]) -> int:
        """How many of these known pages nobody holds."""
        return sum(page in self._idle for page in pages)

    def register(self, page: int, key: bytes) -> None:
        """Makes a held page's content known, unless another page is known to have it."""
        if not self._holders[page]:
            raise PageError(f"page {page} is to be known, but nobody holds it")
        if key not in self._by_key and page not in self._keys:
            self._by_key[key] = page
            self._keys[page] = key

    def clear(self) -> None:
        """Forgets all content, for what the pages hold is no longer what the model would write."""
        self._allocator.free(self._idle)
        self._idle.clear()
        self._by_key.clear()
        self._keys.clear()

    def _forget(self, page: int) -> None:
        del self._by_key[self._keys.pop(page)]
