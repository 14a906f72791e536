"""The crew: every item once, never more at a time than workers, and the first failure stops it."""

import asyncio

import pytest

from flyray.cluster.crew import work_through


def test_items_are_taken_only_by_free_workers() -> None:
    taken: list[int] = []
    finished: list[int] = []
    ahead: list[int] = []

    def items():
        for item in range(20):
            taken.append(item)
            ahead.append(len(taken) - len(finished))
            yield item

    async def work(item: int) -> None:
        for _ in range(item % 3):
            await asyncio.sleep(0)
        finished.append(item)

    asyncio.run(work_through(items(), work, 3))
    assert taken == list(range(20))
    assert sorted(finished) == taken
    assert max(ahead) == 3


def test_the_first_failure_cancels_the_others_and_is_raised_as_it_is() -> None:
    cancelled: list[int] = []

    async def work(item: int) -> None:
        if item == 2:
            raise KeyError("item 2")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    with pytest.raises(KeyError, match="item 2"):
        asyncio.run(work_through(range(10), work, 3))
    assert sorted(cancelled) == [0, 1]


def test_no_workers_are_refused() -> None:
    async def work(item: int) -> None:
        raise AssertionError(item)

    with pytest.raises(ValueError, match="0 workers"):
        asyncio.run(work_through([1], work, 0))
