"""What has come for one request and has not been read: many writers' calls, one reader."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import chain

from ..actors.request import Progress


class Inbox:
    """A queue of one request's news. A reader that is behind gets what has gathered as one `Progress`.

    So a client that is slow, or a machine that is busy, costs a write a moment and not a write a token.
    """

    def __init__(self) -> None:
        self._news: list[Progress] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, progress: Progress) -> None:
        """Adds news and wakes the reader."""
        self._news.append(progress)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> Progress:
        """All that has come, at least one; an error comes alone, after what came before it."""
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        news = self._news
        if len(news) == 1:
            self._news = []
            return news[0]
        end = next((index for index, item in enumerate(news) if item.finish == "error"), len(news))
        taken, self._news = news[: max(end, 1)], news[max(end, 1) :]
        return together(taken)


def together(news: list[Progress]) -> Progress:
    """News of one request, one after another, as one."""
    if len(news) == 1:
        return news[0]
    return replace(
        news[-1],
        tokens=tuple(chain.from_iterable(item.tokens for item in news)),
        logprobs=tuple(chain.from_iterable(item.logprobs for item in news)),
        top_logprobs=tuple(chain.from_iterable(item.top_logprobs for item in news)),
        scores=tuple(chain.from_iterable(item.scores for item in news)),
        divergences=tuple(chain.from_iterable(item.divergences for item in news)),
        agreements=tuple(chain.from_iterable(item.agreements for item in news)),
        cached_tokens=sum(item.cached_tokens for item in news),
    )
