"""One request's news: nothing is lost or reordered however it is read, and an error never swallows tokens."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.request import Progress
from flyray.actors.wire import encode
from flyray.cluster.inbox import Inbox

PIECES = st.lists(st.integers(0, 3), max_size=12)


def news(pieces: list[int], finish: str) -> list[Progress]:
    """Pieces of so many tokens, numbered through, with all that may come beside them; then the end."""
    made, token = [], 0
    for count in pieces:
        tokens = tuple(range(token, token + count))
        top = tuple(((each, -0.1),) for each in tokens)
        made.append(Progress("r", tokens, tuple(-float(each) for each in tokens), (), "", "", (), (), top))
        token += count
    if made:
        made[0] = Progress(
            "r", made[0].tokens, made[0].logprobs, (-1.0,), "", "", (0.5,), (True,), made[0].top_logprobs, 7
        )
    return [*made, Progress("r", (), (), (), finish, "gone" if finish == "error" else "")]


def whole(read: list[Progress]) -> tuple:
    fields = ("tokens", "logprobs", "scores", "divergences", "agreements", "top_logprobs")
    joined = tuple(sum((getattr(item, field) for item in read), ()) for field in fields)
    return (*joined, sum(item.cached_tokens for item in read), read[-1].finish, read[-1].error)


@given(PIECES, st.sampled_from(["stop", "length", "error"]), st.lists(st.integers(1, 5), min_size=13, max_size=13))
def test_a_reader_that_is_behind_gets_the_same_in_fewer_pieces(pieces, finish, together):
    made = news(pieces, finish)

    async def read() -> list[Progress]:
        inbox, taken, rest = Inbox(), [], list(made)
        for count in together:
            for item in rest[:count]:
                inbox.put(item)
            if rest:
                taken.append(await inbox.take())
            del rest[:count]
        while not taken[-1].finish:
            taken.append(await inbox.take())
        return taken

    taken = asyncio.run(read())
    assert whole(taken) == whole(made)
    assert len(taken) <= len(made)
    assert not any(item.finish for item in taken[:-1])
    if finish == "error":
        assert taken[-1] == made[-1]


def test_a_reader_waits_for_what_comes():
    async def run() -> Progress:
        inbox = Inbox()
        reading = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        inbox.put(news([], "stop")[0])
        return await reading

    assert asyncio.run(run()).finish == "stop"


def test_one_token_made_fast_is_the_same_news():
    made, same = Progress.of_token("r", 7, -0.5), Progress("r", (7,), (-0.5,), (), "", "")
    assert (made, hash(made), repr(made)) == (same, hash(same), repr(same))
    assert encode(made) == encode(same)
    assert replace(made, finish="stop") == replace(same, finish="stop")
