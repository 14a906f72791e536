"""Thinking, content, tool calls and stop strings out of tokens, wherever a stream is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.front.answers import ChatAnswer, ChatDelta
from flyray.cluster.front.reasoning import AnswerParser
from flyray.cluster.front.stops import StopStrings
from flyray.cluster.tokenizer import Tokenizer

TOKENIZER = Tokenizer(DEMO_MODEL)
plain = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab 🦙é")), max_size=20)
names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)


def call_text(header: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{header}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def section(*calls: str) -> str:
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


def read(
    text: str | list[int], *, thinking: bool = True, tools: bool = True, stops: tuple[str, ...] = ()
) -> ChatAnswer:
    """The whole answer, parsed token by token. User-like text in `text` must hold no markers."""
    ids = text if isinstance(text, list) else TOKENIZER.encode(text, allow_special=True)
    parser = AnswerParser(TOKENIZER, thinking=thinking, tools=tools, stops=stops)
    answer = ChatAnswer()
    parts = []
    for token in ids:
        parts.append(parser.add(token))
        if parser.stopped:
            break
    for part in [*parts, parser.finish()]:
        calls = (part.tool_call,) if part.tool_call else ()
        answer.add(ChatDelta(reasoning=part.reasoning, content=part.content, tool_calls=calls))
    return answer


@given(reasoning=plain, content=plain, calls=st.lists(st.tuples(names, st.dictionaries(plain, plain, max_size=3))))
def test_all_parts_come_back(reasoning, content, calls):
    # What a model writes as text is text, also where it reads like a marker: only the markers become special tokens.
    # Only the markers become special tokens: what a model writes as text may read like one.
    parts = [(reasoning, False), ("</think>", True), (content, False), ("<|tool_calls_section_begin|>", True)]
    for i, (name, arguments) in enumerate(calls):
        parts += [("<|tool_call_begin|>", True), (f"functions.{name}:{i}", False)]
        parts += [("<|tool_call_argument_begin|>", True), (json.dumps(arguments), False), ("<|tool_call_end|>", True)]
    parts += [("<|tool_calls_section_end|>", True)]
    answer = read([token for text, special in parts for token in TOKENIZER.encode(text, special)])
    assert (answer.reasoning, answer.content) == (reasoning, content)
    assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == calls
    assert [call.id for call in answer.tool_calls] == [f"functions.{name}:{i}" for i, (name, _) in enumerate(calls)]


@pytest.mark.parametrize(
    ("header", "name", "id"),
    [
        ("functions.get:3", "get", "functions.get:3"),
        (" functions.get:3\n", "get", "functions.get:3"),
        ("get:3", "get", "functions.get:3"),
        ("functions.get", "get", "functions.get:0"),
        ("functions.a.b:12", "a.b", "functions.a.b:12"),
        ("functions.fünf:0", "fünf", "functions.fünf:0"),
    ],
)
def test_headers(header, name, id):
    call = read("</think>" + section(call_text(header, "{}"))).tool_calls[0]
    assert (call.name, call.id, call.arguments) == (name, id, "{}")


def test_a_section_inside_the_thinking_ends_it():
    answer = read("hmm" + section(call_text("functions.f:0", '{"a": 1}')) + "after")
    assert (answer.reasoning, answer.content) == ("hmm", "after")
    assert answer.tool_calls[0].arguments == '{"a": 1}'


def test_a_call_that_was_cut_off_keeps_what_came():
    answer = read('</think><|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a')
    assert (answer.tool_calls[0].name, answer.tool_calls[0].arguments) == ("f", '{"a')


def test_a_header_that_was_cut_off_is_no_call():
    assert read("</think><|tool_calls_section_begin|><|tool_call_begin|>functions.f").tool_calls == []


def test_without_tools_the_markers_are_text():
    text = section(call_text("functions.f:0", "{}"))
    answer = read(text, thinking=False, tools=False)
    assert answer.content == text
    assert answer.tool_calls == []


def test_without_thinking_all_is_content():
    answer = read("Hello", thinking=False)
    assert (answer.reasoning, answer.content) == ("", "Hello")


def test_stop_strings_are_looked_for_in_the_content_alone():
    answer = read("a STOP b</think>c STOP d", stops=("STOP",))
    assert (answer.reasoning, answer.content) == ("a STOP b", "c ")


def test_held_back_text_comes_before_a_tool_call():
    answer = read("</think>ab ST" + section(call_text("functions.f:0", "{}")), stops=("STOP",))
    assert (answer.content, len(answer.tool_calls)) == ("ab ST", 1)


def cut_at_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The obvious way: grow the text by one character until it ends in a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


small = st.text(alphabet="ab", max_size=12)


@given(pieces=st.lists(small), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4).map(tuple))
def test_stop_strings_however_the_text_is_cut(pieces, stops):
    text = "".join(pieces)
    expected, found = cut_at_stop(text, stops)
    stream = StopStrings(stops)
    shown = "".join(stream.add(piece) for piece in pieces)
    assert text.startswith(shown)
    assert shown + stream.finish() == expected
    assert stream.found is found


def test_nothing_is_held_back_without_need():
    stream = StopStrings(("END",))
    assert [stream.add(piece) for piece in ("abc", "E", "x", "EN", "D", "more")] == ["abc", "", "Ex", "", "", ""]
    assert stream.found
