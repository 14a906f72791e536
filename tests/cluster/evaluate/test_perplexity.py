"""Text and its scores: what is read and chosen, how it is cut, and what the numbers mean."""

import asyncio
import gzip
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.request import Generate, Progress
from flyray.cluster.evaluate.distributions import Distributions, Shelf
from flyray.cluster.evaluate.perplexity import (
    Document,
    ScoringError,
    TextError,
    TextScore,
    choose,
    cut_windows,
    read_documents,
    score_text,
)
from flyray.cluster.tokenizer import Tokenizer


class Dice:
    """Gives every token the log probability -its id / 100; a prompt that begins with 13 is refused. Compared, a token's
    divergence is its id / 1000, and the even ones agree. Wants what it compares with to have been kept."""

    def __init__(self, short: bool = False, distant: bool = True) -> None:
        self.short = short
        self.distant = distant
        self.kept: set[str] = set()
        self.requests: list[Generate] = []

    async def generate(self, request: Generate) -> AsyncIterator[Progress]:
        self.requests.append(request)
        scores = tuple(-token / 100 for token in request.prompt[1:])
        if request.prompt[0] == 13:
            yield Progress(request.request, (), (), (), "error", "no room for 13")
            return
        divergences: tuple[float, ...] = ()
        agreements: tuple[bool, ...] = ()
        if request.compare and self.distant:
            assert request.compare in self.kept
            divergences = tuple(token / 1000 for token in request.prompt[1:])
            agreements = tuple(token % 2 == 0 for token in request.prompt[1:])
        await asyncio.sleep(0)
        yield Progress(request.request, (), (), scores[:2], "", "", divergences[:2], agreements[:2])
        last = () if self.short else scores[2:]
        yield Progress(request.request, (), (), last, "length", "", divergences[2:], agreements[2:])
        if request.keep:
            self.kept.add(request.keep)


@given(texts=st.lists(st.text(max_size=80), max_size=5), length=st.integers(2, 20))
def test_windows_hold_every_token_once(tokenizer: Tokenizer, texts: list[str], length: int) -> None:
    documents = [Document("s", text) for text in texts]
    windows = cut_windows(tokenizer, documents, length)
    for number, document in enumerate(documents):
        ids = tokenizer.encode(document.text, allow_special=False)
        found = [token for window in windows if window.document == number for token in window.tokens]
        assert found == (ids if len(ids) % length != 1 else ids[:-1])
    for window in windows:
        assert 2 <= len(window.tokens) <= length
        assert window.size == sum(len(tokenizer.token_bytes(token)) for token in window.tokens[1:])


def test_windows_too_short_to_score(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="windows of 1 tokens"):
        cut_windows(tokenizer, [Document("s", "text")], 1)


def test_scores_are_sums_over_documents(tokenizer: Tokenizer) -> None:
    windows = cut_windows(tokenizer, [Document("s", "one two three four"), Document("s", "five six")], 3)
    dice = Dice()
    score = asyncio.run(score_text(dice, windows, concurrency=4))
    for number in (0, 1):
        scored = [token for window in windows if window.document == number for token in window.tokens[1:]]
        assert score.nats[number] == pytest.approx(sum(scored) / 100)
        assert score.tokens[number] == len(scored)
    assert score.perplexity.value == pytest.approx(math.exp(sum(score.nats) / sum(score.tokens)))
    assert score.bits_per_byte.value == pytest.approx(sum(score.nats) / math.log(2) / sum(score.sizes))
    assert {(request.max_tokens, request.score_prompt, request.priority) for request in dice.requests} == {(0, True, 1)}


def test_lost_and_refused_windows_are_errors(tokenizer: Tokenizer) -> None:
    windows = cut_windows(tokenizer, [Document("s", "one two three four five six")], 5)
    with pytest.raises(ScoringError, match="2 scores for a window of 5 tokens"):
        asyncio.run(score_text(Dice(short=True), windows, concurrency=1))
    refused = [type(windows[0])(0, (13, 14), 1)]
    with pytest.raises(ScoringError, match="no room for 13"):
        asyncio.run(score_text(Dice(), refused, concurrency=1))


def test_distances_are_sums_over_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Both columns run at once: what is compared waits for what is kept."""
    texts = ["one two three four five six", "seven eight", "nine ten eleven"]
    windows = cut_windows(tokenizer, [Document("s", text) for text in texts], 3)
    dice, shelf = Dice(), Shelf(tmp_path / "shelf")

    async def both() -> tuple[TextScore, TextScore]:
        comparing = asyncio.create_task(
            score_text(dice, windows, concurrency=3, distributions=Distributions(shelf, False))
        )
        await asyncio.sleep(0)
        kept = await score_text(dice, windows, concurrency=2, distributions=Distributions(shelf, True))
        return kept, await comparing

    kept, compared = asyncio.run(both())
    assert (kept.divergences, kept.agreements) == ((), ())
    assert kept.nats == compared.nats
    assert len(dice.kept) == len(windows)
    for number in range(len(texts)):
        scored = [token for window in windows if window.document == number for token in window.tokens[1:]]
        assert compared.divergences[number] == pytest.approx(sum(scored) / 1000)
        assert compared.agreements[number] == sum(token % 2 == 0 for token in scored)
    assert compared.kl.value == pytest.approx(sum(compared.divergences) / sum(compared.tokens))
    assert compared.top1.value == sum(compared.agreements) / sum(compared.tokens)
    with pytest.raises(ScoringError, match="0 divergences and 0 agreements for a window of"):
        asyncio.run(score_text(Dice(distant=False), windows, concurrency=1, distributions=Distributions(shelf, False)))


counts = st.integers(1, 200)


@given(st.lists(counts.flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(0, tokens))), min_size=2))
def test_distances_stay_where_they_can_be(documents: list[tuple[int, int]]) -> None:
    tokens, agreed = zip(*documents, strict=True)
    divergences = tuple(float(total - right) for total, right in documents)
    score = TextScore((1.0,) * len(tokens), tokens, tokens, divergences, agreed)
    assert 0 <= score.kl.low <= score.kl.value <= score.kl.high
    assert 0 <= score.top1.low <= score.top1.value <= score.top1.high <= 1
    assert score.kl.value == pytest.approx(1 - score.top1.value)
    with pytest.raises(ValueError, match="0 sums"):
        _ = TextScore((1.0,) * len(tokens), tokens, tokens).kl


def test_ratio_of_paired_scores() -> None:
    better = TextScore((10.0, 20.0, 33.0), (10, 20, 30), (30, 60, 90))
    worse = TextScore((11.0, 22.0, 36.0), (10, 20, 30), (30, 60, 90))
    ratio = worse.ratio_to(better)
    assert ratio.value == pytest.approx(worse.perplexity.value / better.perplexity.value)
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(0.1), math.exp(0.1)))  # every token costs 0.1 more
    assert better.perplexity.high / better.perplexity.low > 1.05
    assert better.ratio_to(better).value == 1.0
    with pytest.raises(ValueError, match="different windows"):
        better.ratio_to(TextScore((1.0,), (10,), (30,)))


def test_documents_of_both_kinds_of_files(tmp_path: Path) -> None:
    lines = [json.dumps({"source": "a", "text": "eins", "group": "g"}), json.dumps({"text": "zwei"})]
    with gzip.open(tmp_path / "text.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    assert list(read_documents(tmp_path / "text.jsonl.gz")) == [
        Document("a", "eins"),
        Document("text.jsonl.gz", "zwei"),
    ]
    paragraphs = [f"{number} " + "word " * 300 + "\n\n" for number in range(12)]
    (tmp_path / "text.txt").write_text("".join(paragraphs))
    pieces = list(read_documents(tmp_path / "text.txt"))
    assert "".join(piece.text for piece in pieces).rstrip() == "".join(paragraphs).rstrip()
    assert [6000 <= len(piece.text) < 8000 for piece in pieces[:-1]] == [True, True]


def test_files_that_hold_no_text(tmp_path: Path) -> None:
    cases = {"a.jsonl": b'{"text": "x"}\n{"txt": 1}', "b.jsonl": b'{"text": 1}', "c.txt": b"\xff\xfe", "d.jsonl": b"[]"}
    words = {
        "a.jsonl": "line 2: must be",
        "b.jsonl": "text: must be a string",
        "c.txt": "not UTF-8",
        "d.jsonl": "line 1",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TextError, match=words[name]):
            list(read_documents(tmp_path / name))
    with pytest.raises(TextError, match=r"none.txt cannot be read: No such file"):
        list(read_documents(tmp_path / "none.txt"))


def test_choose_takes_sources_in_turns_up_to_a_size() -> None:
    documents = [Document("a", "a" * 10), Document("a", "A" * 10), Document("b", "ä" * 4), Document("b", "B" * 10)]
    assert [document.text for document in choose(documents, 21)] == ["a" * 10, "ä" * 4, "A" * 3]
    assert [document.text for document in choose(documents, 14)] == ["a" * 7, "äää"]
    assert choose(documents, 0) == []
    assert len(choose(documents, 1000)) == 4
