"""Pages by content, against a plain account of who holds what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flyray.actors.pages import PageAllocator, PageError
from flyray.actors.prefix_cache import PrefixCache, extend_keys

TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=6)


def keys_of(tokens: list[int], page_size: int = 1) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, page_size)
    return keys


class PrefixCacheMachine(RuleBasedStateMachine):
    """Sequences of one token a page that begin, share what is known, make theirs known, and end, in any order.

    wrote: the content of every page as its last writer left it. held: (pages, text) of those that run.
    """

    @initialize(num_pages=st.integers(1, 10))
    def start(self, num_pages: int) -> None:
        self.cache = PrefixCache(PageAllocator(num_pages, 1))
        self.num_pages = num_pages
        self.wrote: dict[int, tuple[int, ...]] = {}
        self.held: list[tuple[list[int], list[int]]] = []

    @rule(text=TEXTS, share=st.booleans(), register=st.booleans())
    def begin(self, text: list[int], share: bool, register: bool) -> None:
        keys = keys_of(text)
        found = self.cache.find(keys) if share else ()
        for place, page in enumerate(found):
            assert self.wrote[page] == tuple(text[: place + 1]), "what is found is what the key says"
        new = len(text) - len(found)
        self.cache.hold(found)
        if new > self.cache.free_pages:
            with pytest.raises(PageError, match=f"{new} pages wanted, {self.cache.free_pages} of"):
                self.cache.allocate(new)
            self.cache.release(found)
            return
        pages = self.cache.allocate(new)
        others = {page for held, _ in self.held for page in held}
        assert not others & set(pages), "what somebody holds is not written"
        for place, page in enumerate(pages, len(found)):
            self.wrote[page] = tuple(text[: place + 1])
        self.held.append(([*found, *pages], text))
        if register:
            for page, key in zip(self.held[-1][0], keys, strict=True):
                self.cache.register(page, key)
            assert len(self.cache.find(keys)) == len(keys)

    @rule(data=st.data())
    def end(self, data: Any) -> None:
        if self.held:
            pages, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            alone = sum(not any(page in held for held, _ in self.held) for page in pages)
            free = self.cache.free_pages
            assert self.cache.freed_by(pages) == alone
            self.cache.release(pages)
            assert self.cache.free_pages == free + alone

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert self.cache.cached_pages == 0
        assert self.cache.find(keys_of([0])) == self.cache.find(keys_of([1])) == ()

    @invariant()
    def no_page_is_lost(self) -> None:
        if hasattr(self, "cache"):
            used = {page for pages, _ in self.held for page in pages}
            assert self.cache.free_pages == self.num_pages - len(used)
            assert self.cache.cached_pages <= self.num_pages


TestPrefixCache = PrefixCacheMachine.TestCase


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), max_size=20), st.integers(1, 4))
def test_keys_are_equal_as_far_as_the_texts_are(one: list[int], other: list[int], page_size: int) -> None:
    first, second = keys_of(one, page_size), keys_of(other, page_size)
    assert len(first) == len(one) // page_size
    for page, (a, b) in enumerate(zip(first, second, strict=False), 1):
        assert (a == b) == (one[: page * page_size] == other[: page * page_size])


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.integers(0, 20), st.integers(1, 4))
def test_keys_may_be_made_bit_by_bit(tokens: list[int], cut: int, page_size: int) -> None:
    keys: list[bytes] = []
    extend_keys(keys, tokens[:cut], page_size)
    extend_keys(keys, tokens, page_size)
    assert keys == keys_of(tokens, page_size)


def test_the_end_of_what_was_used_first_goes_first() -> None:
    cache = PrefixCache(PageAllocator(6, 1))
    texts = [[1, 2, 3], [4, 5, 6]]
    held = []
    for text in texts:
        held.append(cache.allocate(3))
        for page, key in zip(held[-1], keys_of(text), strict=True):
            cache.register(page, key)
    for pages in held:
        cache.release(pages)
    left = []
    for _ in range(6):
        left.append(tuple(len(cache.find(keys_of(text))) for text in texts))
        cache.allocate(1)
    assert left == [(3, 3), (2, 3), (1, 3), (0, 3), (0, 2), (0, 1)]


def test_what_is_used_again_stays_longer() -> None:
    cache = PrefixCache(PageAllocator(2, 1))
    for text in ([1], [2]):
        (page,) = cache.allocate(1)
        cache.register(page, *keys_of(text))
        cache.release((page,))
    found = cache.find(keys_of([1]))
    cache.hold(found)
    cache.release(found)
    cache.allocate(1)
    assert [len(cache.find(keys_of(text))) for text in ([1], [2])] == [1, 0]


def test_mistakes_are_refused() -> None:
    cache = PrefixCache(PageAllocator(2, 1))
    with pytest.raises(PageError, match="page 0 is to be shared, but its content is not known"):
        cache.hold((0,))
    with pytest.raises(PageError, match="page 0 is given back, but nobody holds it"):
        cache.release((0,))
    with pytest.raises(PageError, match="page 0 is to be known, but nobody holds it"):
        cache.register(0, b"key")
    with pytest.raises(PageError, match="3 pages wanted, 2 of 2 are free"):
        cache.allocate(3)
