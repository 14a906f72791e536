"""A crew of asyncio workers that share one queue of items, as many at a time as there are workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

# Items that a worker may finish without ever waiting before it looks at the event loop: a Ctrl-C must not wait for all.
ITEMS_PER_TURN = 256


async def work_through(items: Iterable[T], work: Callable[[T], Awaitable[None]], workers: int) -> None:
    """Awaits work(item) for every item, `workers` at a time; items are taken only when a worker is free.

    The first exception cancels the other workers and is raised as it is. Raises ValueError when workers < 1.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers: at least one is needed")
    queue = iter(items)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(_worker(queue, work))
    except BaseExceptionGroup as errors:
        raise _first(errors) from None


async def _worker(queue: Iterator[T], work: Callable[[T], Awaitable[None]]) -> None:
    for number, item in enumerate(queue, start=1):
        await work(item)
        if number % ITEMS_PER_TURN == 0:
            await asyncio.sleep(0)


def _first(errors: BaseExceptionGroup) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
