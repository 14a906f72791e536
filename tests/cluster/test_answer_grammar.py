"""The grammars of whole answers: ways at random through them, read as a client gets them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from grammar_walk import GrammarWalker

from flyray.cluster.answer_grammar import chat_grammar, completion_grammar
from flyray.cluster.answer_run import RunMaker, ServiceLimits
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.front.answers import ChatAnswer, ChatDelta
from flyray.cluster.front.errors import RequestError
from flyray.cluster.front.reasoning import AnswerParser
from flyray.cluster.front.requests import ChatRequest, CompletionRequest, parse

MESSAGES = [{"role": "user", "content": "hi"}]
ZONE = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}
STRICT = {"type": "function", "function": {"name": "clock", "strict": True, "parameters": ZONE}}
UNSAID = {"type": "function", "function": {"name": "unsaid", "parameters": ZONE}}
LOOSE = {"type": "function", "function": {"name": "loose", "strict": False, "parameters": {"type": "array"}}}
BARE = {"type": "function", "function": {"name": "bare"}}
FORM = {"type": "json_schema", "json_schema": {"name": "zone", "schema": ZONE}}
SEEDS = range(12)


@pytest.fixture(scope="module")
def walker() -> Iterator[GrammarWalker]:
    walker = GrammarWalker(DEMO_MODEL)
    yield walker
    walker.book.close()


def chat(**fields) -> ChatRequest:
    return parse({"model": "m", "messages": MESSAGES, "thinking": False} | fields, ChatRequest)


def answers(walker: GrammarWalker, request: ChatRequest, begun: str = "") -> list[ChatAnswer]:
    """What clients get of answers at random."""
    grammar = chat_grammar(request, walker.tokenizer)
    assert grammar is not None
    found = []
    for seed in SEEDS:
        tokens, finish = walker.walk(grammar.text, seed, walker.tokenizer.encode(begun, allow_special=True))
        assert finish in ("stop", "length")
        if finish == "length":
            continue
        parser = AnswerParser(walker.tokenizer, thinking=request.thinks, tools=bool(request.offered_tools))
        answer = ChatAnswer()
        for part in [*map(parser.add, tokens), parser.finish()]:
            calls = (part.tool_call,) if part.tool_call else ()
            answer.add(ChatDelta(part.reasoning, part.content, calls))
        found.append(answer)
    assert found
    return found


def test_answers_without_a_form_have_no_grammar(walker: GrammarWalker) -> None:
    for fields in ({}, {"tools": [UNSAID]}, {"tools": [STRICT], "tool_choice": "none"}):
        assert chat_grammar(chat(**fields), walker.tokenizer) is None
    assert completion_grammar(parse({"model": "m", "prompt": "a"}, CompletionRequest)) is None


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        ({"response_format": FORM}, lambda text: json.loads(text)["zone"] in ("UTC", "CET")),
        ({"structured_outputs": {"json": json.dumps(ZONE)}}, lambda text: json.loads(text)["zone"] in ("UTC", "CET")),
        ({"structured_outputs": {"json_object": True}}, lambda text: isinstance(json.loads(text), dict)),
        ({"structured_outputs": {"choice": ["a b", '"', "<think>"]}}, lambda text: text in ("a b", '"', "<think>")),
        ({"guided_json": {"const": 1}}, lambda text: json.loads(text) == 1),
        ({"guided_choice": ["yes"]}, lambda text: text == "yes"),
        ({"guided_regex": "[a-c]{2}\\n[0-9]+"}, lambda text: re.fullmatch("[a-c]{2}\n[0-9]+", text)),
        ({"guided_grammar": 'root ::= "x" y*\ny ::= "y" | "z"'}, lambda text: re.fullmatch("x[yz]*", text)),
    ],
)
def test_forms(walker: GrammarWalker, fields: dict, fits) -> None:
    for answer in answers(walker, chat(**fields)):
        assert fits(answer.content), answer.content
    request = parse({"model": "m", "prompt": "a"} | fields, CompletionRequest)
    grammar = completion_grammar(request)
    assert grammar is not None
    tokens, finish = walker.walk(grammar.text, 3)
    assert finish == "length" or fits(walker.tokenizer.decode(tokens))


def test_the_form_begins_behind_the_thinking(walker: GrammarWalker) -> None:
    found = answers(walker, chat(thinking=True, response_format=FORM), "so {</think>")
    assert {answer.reasoning for answer in found} == {"so {"}
    assert {json.loads(answer.content)["zone"] for answer in found} == {"UTC", "CET"}


def test_required_tools_are_called_with_arguments_of_their_schemas(walker: GrammarWalker) -> None:
    found = answers(walker, chat(tools=[STRICT, UNSAID, LOOSE, BARE], tool_choice="required"))
    calls = [call for answer in found for call in answer.tool_calls]
    assert all(answer.tool_calls and not answer.content for answer in found)
    assert any(len(answer.tool_calls) > 1 for answer in found)
    assert {call.name for call in calls} == {"clock", "unsaid", "loose", "bare"}
    for call in calls:
        arguments = json.loads(call.arguments)
        assert re.fullmatch(rf"functions\.{call.name}:\d+", call.id)
        assert isinstance(arguments, dict)
        if call.name in ("clock", "unsaid"):
            assert arguments["zone"] in ("UTC", "CET")
            assert [*arguments] == ["zone"]
        assert call.name != "bare" or arguments == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": {"type": "function", "function": {"name": "unsaid"}}},
        {"tool_choice": "required", "parallel_tool_calls": False, "tools": [UNSAID]},
    ],
)
def test_one_call_and_no_other(walker: GrammarWalker, fields: dict) -> None:
    for answer in answers(walker, chat(**{"tools": [STRICT, UNSAID]} | fields)):
        assert [call.name for call in answer.tool_calls] == ["unsaid"]
        assert not answer.content


def test_strict_tools_may_be_called_behind_any_text(walker: GrammarWalker) -> None:
    begun = "let me see <|tool_calls_section_begin|>"
    for answer in answers(walker, chat(tools=[STRICT, UNSAID]), begun):
        assert answer.content == "let me see "
        for call in answer.tool_calls:
            assert call.name == "unsaid" or json.loads(call.arguments)["zone"] in ("UTC", "CET")
    begun += '<|tool_call_begin|>functions.unsaid:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>'
    (answer, *_) = answers(walker, chat(tools=[UNSAID], parallel_tool_calls=False), begun)
    assert [call.arguments for call in answer.tool_calls] == ['{"a": 1}']


def test_with_a_form_and_tools_it_is_one_or_the_other(walker: GrammarWalker) -> None:
    found = answers(walker, chat(tools=[STRICT], response_format=FORM))
    assert {bool(answer.tool_calls) for answer in found} == {True, False}
    assert all(json.loads(answer.content)["zone"] for answer in found if not answer.tool_calls)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"if": {}}}}},
            "response_format.json_schema.schema.if",
            "is not enforced here; leave it out",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "must be an object",
        ),
        ({"guided_json": "{"}, "guided_json", "is not JSON"),
        ({"structured_outputs": {"regex": "a^b"}}, "structured_outputs.regex", "'^' is followed only"),
        (
            {"tools": [BARE, LOOSE | {"function": LOOSE["function"] | {"strict": True}}]},
            "tools[1].function.parameters.type",
            "must be 'object'",
        ),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos", "whose form 'guided_choice' gives"),
        ({"guided_choice": ["a"], "min_tokens": 2}, "min_tokens", "whose form 'guided_choice' gives"),
        ({"guided_choice": ["a"], "stop_token_ids": [5]}, "stop_token_ids", "token 5, which is text"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(walker: GrammarWalker, fields: dict, param: str, says: str) -> None:
    def ask(request: ChatRequest) -> None:
        grammar = chat_grammar(request, walker.tokenizer)
        RunMaker(walker.tokenizer, ServiceLimits(200)).runs(request, [1], "messages", 1.0, 1, grammar)

    with pytest.raises(RequestError) as caught:
        ask(chat(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert says in caught.value.message


def test_what_the_engine_is_asked(walker: GrammarWalker) -> None:
    request = chat(guided_choice=["a"], stop_token_ids=[walker.tokenizer.special["[PAD]"]], n=2)
    grammar = chat_grammar(request, walker.tokenizer)
    runs = RunMaker(walker.tokenizer, ServiceLimits(200)).runs(request, [1], "messages", 1.0, 2, grammar)
    assert grammar is not None
    assert {run.sampling.grammar for run in runs} == {grammar.text}
    assert {run.sampling.grammar_ends for run in runs} == {runs[0].stop_tokens}
    assert len(runs[0].stop_tokens) == 3
