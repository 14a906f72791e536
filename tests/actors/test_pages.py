"""A page is owned by one at most, and none gets lost."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flyray.actors.pages import PageAllocator, PageError


class PagesMachine(RuleBasedStateMachine):
    """Any order of taking and giving back, right and wrong, against a plain model."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.pages = PageAllocator(num_pages, 16)
        self.owned: list[tuple[int, ...]] = []

    @rule(count=st.integers(0, 14))
    def allocate(self, count: int) -> None:
        free = self.pages.free_pages
        if count > free:
            with pytest.raises(PageError, match=f"{count} pages wanted, {free} of"):
                self.pages.allocate(count)
            return
        pages = self.pages.allocate(count)
        assert len(pages) == len(set(pages)) == count
        assert all(0 <= page < self.pages.num_pages for page in pages)
        assert not {page for group in self.owned for page in group} & set(pages)
        self.owned.append(pages)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.owned:
            self.pages.free(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @rule(data=st.data())
    def free_part(self, data: st.DataObject) -> None:
        if self.owned and self.owned[-1]:
            last = self.owned.pop()
            cut = data.draw(st.integers(0, len(last)))
            self.pages.free(last[:cut])
            self.owned.append(last[cut:])

    @rule(data=st.data(), page=st.integers(-2, 14))
    def free_what_is_not_owned(self, data: st.DataObject, page: int) -> None:
        owned = [page for group in self.owned for page in group]
        wrong = [*owned, data.draw(st.sampled_from(owned))] if page in owned else [*owned, page]
        with pytest.raises(PageError, match="given back"):
            self.pages.free(wrong)

    @invariant()
    def counts_agree(self) -> None:
        used = sum(map(len, self.owned))
        assert self.pages.used_pages == used
        assert self.pages.free_pages == self.pages.num_pages - used


TestPages = PagesMachine.TestCase


def test_lowest_first_then_last_given_back() -> None:
    pages = PageAllocator(5, 16)
    first, second = pages.allocate(2), pages.allocate(2)
    assert (first, second) == ((0, 1), (2, 3))
    pages.free(first)
    assert pages.allocate(3) == (0, 1, 4)


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_for(tokens: int, count: int) -> None:
    assert PageAllocator(4, 16).pages_for(tokens) == count


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 16), (4, 0), (-1, 16)])
def test_sizes_are_checked(num_pages: int, page_size: int) -> None:
    with pytest.raises(PageError, match="must be at least 1"):
        PageAllocator(num_pages, page_size)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(PageError, match="cannot allocate -1 pages"):
        PageAllocator(4, 16).allocate(-1)
