"""The journal over engines that are lost at any place of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.request import Generate, Progress
from flyray.actors.step_plan import Sampling
from flyray.cluster.front.errors import EngineUnavailable
from flyray.cluster.front.journal import MOST_FRUITLESS, Journal

WHOLE = tuple(range(100, 112))
REQUEST = Generate("mine", (1, 2), len(WHOLE), Sampling(0.0, 1.0, 0, 0), (), 0, False)


class Engine:
    """Goes on behind what a request brings, with so many tokens, and is lost then."""

    def __init__(self, life: int, answers: str = "alike", error: Progress | None = None) -> None:
        self.answers = answers
        self._life, self._error = life, error
        self.asked: list[Generate] = []
        self.closed = 0

    async def generate(self, request: Generate) -> AsyncGenerator[Progress, None]:
        self.asked.append(request)
        begin = len(request.emitted)
        try:
            for place in range(begin, min(begin + self._life, len(WHOLE))):
                last = place + 1 == len(WHOLE)
                cached = 2 if place == 0 else 0
                news = (WHOLE[place],), (-1.0 * place,), (), "length" if last else "", ""
                yield Progress(request.request, *news, cached_tokens=cached)
            yield self._error or Progress.failed(request.request, "killed", lost=True)
        finally:
            self.closed += 1


class Succession:
    """`Engines` that gives one engine after another, and none twice."""

    def __init__(self, *engines: Engine) -> None:
        self.left = list(engines)
        self.lost: list[Any] = []

    async def engine_for(self, prompt: Sequence[int], lost: Any = None) -> Any:
        assert tuple(prompt) == REQUEST.prompt
        self.lost.append(lost)
        if not self.left:
            raise EngineUnavailable("none comes")
        return self.left.pop(0)


async def told(journal: Journal) -> list[Progress]:
    return [progress async for progress in journal.generate(REQUEST)]


@given(lives=st.lists(st.integers(1, 5), max_size=12))
def test_who_reads_hears_every_token_once_and_the_end_once(lives: list[int]) -> None:
    engines = [*map(Engine, lives), Engine(len(WHOLE))]
    replays: list[None] = []
    succession = Succession(*engines)
    news = asyncio.run(told(Journal(succession, lambda: replays.append(None))))
    assert tuple(token for progress in news for token in progress.tokens) == WHOLE
    assert [value for progress in news for value in progress.logprobs] == [-1.0 * place for place in range(len(WHOLE))]
    assert [progress.finish for progress in news] == [""] * (len(WHOLE) - 1) + ["length"]
    assert {progress.request for progress in news} == {"mine"}
    assert sum(progress.cached_tokens for progress in news) == 2
    used = engines[: len(succession.lost)]
    assert succession.lost == [None, *used[:-1]]
    assert len(replays) == len(used) - 1
    assert all(engine.closed == 1 for engine in used)
    names = [engine.asked[0].request for engine in used]
    assert len(set(names)) == len(names), "an engine that knows the request still takes it anew"


def test_a_request_that_ends_every_engine_is_given_up() -> None:
    engines = [Engine(3), *(Engine(0) for _ in range(MOST_FRUITLESS)), Engine(99)]
    with pytest.raises(EngineUnavailable, match=rf"{MOST_FRUITLESS} engines were lost .* because: killed"):
        asyncio.run(told(Journal(Succession(*engines))))


def test_an_engine_that_answers_otherwise_is_refused() -> None:
    with pytest.raises(EngineUnavailable, match="precision w8a8, not precision w4a8"):
        asyncio.run(told(Journal(Succession(Engine(3, "precision w4a8"), Engine(99, "precision w8a8")))))


def test_a_refusal_is_told_and_not_sent_on() -> None:
    refusal = Progress.failed("another", "prompt: too long")
    succession = Succession(Engine(2), Engine(0, error=refusal), Engine(99))
    news = asyncio.run(told(Journal(succession)))
    assert (news[-1].request, news[-1].finish, news[-1].error) == ("mine", "error", "prompt: too long")
    assert len(succession.left) == 1


def test_no_engine_is_the_reason_that_is_told() -> None:
    with pytest.raises(EngineUnavailable, match="none comes"):
        asyncio.run(told(Journal(Succession(Engine(2)))))


def test_a_request_that_is_closed_is_sent_to_no_other_engine() -> None:
    first, succession = Engine(2), Succession()
    succession.left = [first, Engine(99)]

    async def leave() -> None:
        async with aclosing(Journal(succession).generate(REQUEST)) as news:
            await anext(news)

    asyncio.run(leave())
    assert first.closed == 1
    assert len(succession.left) == 1
