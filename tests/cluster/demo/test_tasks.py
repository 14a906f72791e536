"""The demo model's tasks: right answers, disjoint splits, the same example from the same seed."""

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.demo.training import phrases, tools
from flyray.cluster.demo.training.tasks import (
    FAMILIES,
    SPLITS,
    adding,
    calling,
    drafted,
    letters,
    lists,
    lookup,
    make_example,
    memory,
    multiplying,
    ordering,
    steps,
    training_example,
    units,
)
from flyray.cluster.demo.training.tasks.example import is_heldout_key

PAIRS = [(family, split) for family in FAMILIES for split in SPLITS if split != "tools" or family == "tool"]
natural = st.integers(0, 10**8)
seeds = st.integers(0, 2**32)


def speaker(seed: int, heldout: bool = False) -> phrases.Speaker:
    return phrases.Speaker(random.Random(seed), heldout)


@given(natural, natural)
def test_addition_writes_every_digit(a: int, b: int) -> None:
    lines = steps.addition(a, b).splitlines()
    written = re.findall(r"write (\d)", "\n".join(lines))
    assert int("".join(reversed(written))) == a + b
    assert lines[-1] == f"result {a + b}"


@given(natural, natural)
def test_subtraction_writes_every_digit(a: int, b: int) -> None:
    written = re.findall(r"write (\d)", steps.subtraction(a, b))
    assert int("".join(reversed(written))) == abs(a - b)
    assert steps.subtraction(a, b).endswith(f"result {a - b}")


@given(st.integers(0, 99999), st.integers(0, 9))
def test_a_product_with_a_digit_writes_every_digit(a: int, b: int) -> None:
    written = re.findall(r"write (\d)", steps.by_digit(a, b))
    assert int("".join(reversed(written))) == a * b


@given(st.integers(0, 999), st.integers(0, 99))
def test_products_end_in_the_product(a: int, b: int) -> None:
    assert steps.multiplication(a, b).endswith(f"result {a * b}")


@given(st.integers(0, 99999), st.integers(2, 24))
def test_division_goes_digit_by_digit(a: int, b: int) -> None:
    quotients = re.findall(r"=(\d+) rest", steps.division(a, b))
    assert int("".join(quotients)) == a // b
    assert steps.division(a, b).endswith(f"result {a // b} rest {a % b}")


@given(seeds)
def test_sums_and_differences(seed: int) -> None:
    for make in (adding.plain, adding.story):
        draft = make(speaker(seed))
        if draft.key:
            a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)", draft.key).groups()
            assert int(draft.answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


@given(seeds)
def test_products_and_quotients(seed: int) -> None:
    draft = multiplying.product(speaker(seed))
    if draft.key:
        a, b = map(int, draft.key.split("*"))
        assert int(draft.answer) == a * b
    draft = multiplying.quotient(speaker(seed))
    if draft.key:
        a, b = map(int, draft.key.split("/"))
        quotient, _, rest = draft.answer.partition(" remainder ")
        assert int(quotient) * b + int(rest or 0) == a
        assert int(rest or 0) < b


@given(seeds)
def test_sorting(seed: int) -> None:
    draft = ordering.sort(speaker(seed))
    down, numbers = re.fullmatch(r"sort(True|False)(\[.*\])", draft.key).groups()
    expected = sorted(json.loads(numbers), reverse=down == "True")
    assert draft.answer == ", ".join(map(str, expected))


@given(seeds)
def test_letters(seed: int) -> None:
    word = letters.reverse(speaker(seed)).key.removeprefix("reverse ")
    assert letters.reverse(speaker(seed)).answer == "".join(reversed(word))
    draft = letters.occurrences(speaker(seed))
    _, letter, word = draft.key.split(" ", 2)
    assert int(draft.answer) == word.count(letter)
    draft = letters.spell(speaker(seed))
    assert draft.answer.replace("-", "") == draft.key.removeprefix("spell ")


@given(seeds)
def test_a_value_looked_up_stands_in_the_text(seed: int) -> None:
    draft = lookup.draft(speaker(seed))
    if draft.answer == lookup.ABSENT:
        missing = re.search(r": no (.*)$", draft.thought)[1]
        assert draft.question.lower().count(missing.lower()) >= 1
    else:
        assert draft.answer in draft.question


@given(seeds)
def test_memory_answers_with_what_was_told(seed: int) -> None:
    draft = memory.draft(speaker(seed))
    told = " ".join(message["content"] for message in draft.messages if message["role"] == "user")
    if draft.thought.startswith("told:"):
        assert draft.answer == memory.UNKNOWN
    else:
        assert draft.thought.split(": ")[1] in told


@given(seeds)
def test_days_away(seed: int) -> None:
    draft = units.days_away(speaker(seed))
    if draft.key:
        n, is_after, start = re.fullmatch(r"(\d+)(True|False)(\d)", draft.key).groups()
        days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
        assert draft.answer == days[(int(start) + (int(n) if is_after == "True" else -int(n))) % 7]


@given(seeds)
def test_a_call_names_a_declared_tool_and_its_parameters(seed: int) -> None:
    draft = calling.draft(speaker(seed))
    declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in draft.tools}
    for call in draft.calls:
        parameters = declared[call["function"]["name"]]
        arguments = json.loads(call["function"]["arguments"])
        assert set(parameters.get("required", ())) <= set(arguments) <= set(parameters["properties"])


@pytest.mark.parametrize(("family", "split"), PAIRS)
def test_the_same_seed_gives_the_same_example(family: str, split: str) -> None:
    assert make_example(random.Random(3), family, split) == make_example(random.Random(3), family, split)


@pytest.mark.parametrize(("family", "split"), PAIRS)
def test_examples_end_where_the_answer_begins(family: str, split: str) -> None:
    rng = random.Random(4)
    for _ in range(20):
        example = make_example(rng, family, split)
        assert example.prompt.endswith("<|im_assistant|>assistant<|im_middle|><think>")
        assert example.completion.endswith("<|im_end|>")
        assert bool(example.answer) != bool(example.calls)


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="no split"):
        make_example(random.Random(0), "add", "tools")


def test_operands_are_held_out_exactly_where_the_split_says_so() -> None:
    for family in FAMILIES:
        for split in ("train", "operands"):
            rng = random.Random(5)
            drafts = [drafted(phrases.Speaker(rng), family, split) for _ in range(30)]
            assert all(is_heldout_key(family, draft.key) == (split == "operands") for draft in drafts)


def test_held_out_phrasings_are_none_of_the_trained_ones() -> None:
    found = 0
    for module in (adding, multiplying, ordering, letters, lists, lookup, memory, units):
        for value in vars(module).values():
            if isinstance(value, phrases.Frames) and value.more:
                trained, held = phrases.parted(value)
                known = {phrases.words_of(p) for group in trained for p in group}
                known |= {phrases.words_of(p) for frame in value.basic for p in phrases.every(frame)}
                assert held, value
                assert not known & {phrases.words_of(p) for group in held for p in group}
                found += 1
    assert found > 25


def test_training_never_uses_held_out_things() -> None:
    rng = random.Random(6)
    for _ in range(500):
        assert not tools.make_tool(rng).is_heldout
        assert tools.make_tool(rng, heldout=True).is_heldout


def test_training_examples_cover_every_family() -> None:
    rng = random.Random(7)
    assert {training_example(rng, 70).family for _ in range(1500)} == set(FAMILIES)
