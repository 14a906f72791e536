"""What a grammar lets a sequence draw: special tokens where it says so, the end where it may be, the same after a
preemption; what is wrong with a grammar ends its sequence alone."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from grammar_walk import GrammarWalker

from flyray.actors.grammar import GrammarWalk
from flyray.actors.sequence_sampler import SequenceSampler
from flyray.actors.step_plan import Sampling, SequenceStart
from flyray.cluster.config import DEMO_MODEL

DEAD_END = 'root ::= "a" b\nb ::= [^\\u0000-\\U0010ffff]'


def tag(content: dict) -> str:
    return json.dumps({"type": "structural_tag", "format": content})


@pytest.fixture(scope="module")
def walker() -> Iterator[GrammarWalker]:
    walker = GrammarWalker(DEMO_MODEL)
    yield walker
    walker.book.close()


def texts(walker: GrammarWalker, walk: GrammarWalk) -> set[str]:
    """What may come next."""
    words = walk.allowed()
    assert words is not None
    return {walker.tokenizer.token_name(int(token)) for token in walker.allowed(words)}


def take(walker: GrammarWalker, walk: GrammarWalk, text: str) -> None:
    for token in walker.tokenizer.encode(text, allow_special=True):
        walk.took(token)


def test_an_answer_ends_exactly_where_its_grammar_may(walker: GrammarWalker) -> None:
    walk = walker.book.walk(tag({"type": "regex", "pattern": "ab?"}), walker.ends, ())
    assert texts(walker, walk) == {"a", "ab"}
    take(walker, walk, "a")
    assert texts(walker, walk) == {"b", "<|im_end|>", "[EOS]"}
    take(walker, walk, "<|im_end|>")
    assert walk.allowed() is None  # a step that ran ahead
    take(walker, walk, "x")
    assert (walk.allowed(), walk.fault) == (None, "")


def test_special_tokens_come_by_their_ids_alone(walker: GrammarWalker) -> None:
    special = walker.tokenizer.special
    thinking = {"type": "any_tokens", "exclude_tokens": sorted(special.values())}
    parts = [thinking, {"type": "token", "token": special["</think>"]}, {"type": "regex", "pattern": "[^q]*"}]
    walk = walker.book.walk(tag({"type": "sequence", "elements": parts}), walker.ends, ())
    words = walk.allowed()
    assert words is not None
    assert set(range(walker.tokenizer.base_size)) | {special["</think>"]} == set(walker.allowed(words).tolist())
    take(walker, walk, "hm</think>")
    found = texts(walker, walk)
    assert found & set(special) == {"<|im_end|>", "[EOS]"}
    assert {"<", "th", "a"} <= found
    assert not any("q" in text for text in found)


@pytest.mark.parametrize(
    ("content", "begun", "says"),
    [
        ({"type": "regex", "pattern": "(?=a)b"}, "", "the grammar cannot be used"),
        ({"type": "grammar", "grammar": DEAD_END}, "a", "the grammar allows no further token"),
        ({"type": "const_string", "value": "ab"}, "ax", "does not follow the grammar"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_masked(
    walker: GrammarWalker, content: dict, begun: str, says: str
) -> None:
    walk = walker.book.walk(tag(content), walker.ends, ())
    take(walker, walk, begun)
    assert walk.allowed() is None
    assert says in walk.fault


def test_a_sequence_goes_on_after_a_preemption_as_if_there_was_none(walker: GrammarWalker) -> None:
    grammar = walker.format({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    how = Sampling(1.0, 1.0, 0, 0, grammar=grammar, grammar_ends=walker.ends)
    answer = walker.tokenizer.encode('{"a": 17}', allow_special=False)
    whole = SequenceSampler(SequenceStart(1, how, False), walker.book)
    for count, token in enumerate([*answer, walker.ends[0]]):
        again = SequenceSampler(
            SequenceStart(2, how, False, generated=count, history=tuple(answer[:count])), walker.book
        )
        changes = [sampler.row(count).changes for sampler in (whole, again)]
        allowed = [None if each is None else each.allowed for each in changes]
        assert allowed[0] is not None
        assert allowed[1] is not None
        assert torch.equal(allowed[0], allowed[1])
        assert token in walker.allowed(allowed[0])
        assert not whole.plain
        whole.took(token)


def test_a_shard_without_a_vocabulary_refuses_a_grammar() -> None:
    how = Sampling(1.0, 1.0, 0, 0, grammar="{}", grammar_ends=(1,))
    with pytest.raises(ValueError, match="knows no vocabulary"):
        SequenceSampler(SequenceStart(1, how, False))


def test_grammars_do_not_change_each_other(walker: GrammarWalker) -> None:
    special = walker.tokenizer.special
    end = {"type": "token", "token": special["</think>"]}
    number = {"type": "regex", "pattern": "0|[1-9][0-9]{0,3}"}
    free = {"type": "any_tokens", "exclude_tokens": sorted(special.values())}
    whole = {"type": "json_schema", "json_schema": {"type": "object"}, "max_whitespace_cnt": 32}
    for other in ([free, end, whole], [number, end], [free, end, number]):
        walker.book.compile(tag({"type": "sequence", "elements": other}))
    walk = walker.book.walk(
        tag({"type": "sequence", "elements": [number, {"type": "regex", "pattern": "!"}]}), (5,), ()
    )
    take(walker, walk, "1")
    assert "</think>" not in texts(walker, walk)
