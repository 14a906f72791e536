"""What requests are taken, and what each refusal says."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.front.errors import RequestError
from flyray.cluster.front.requests import ChatRequest, CompletionRequest, parse

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"description": "d", "name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(**fields) -> ChatRequest:
    return parse({"model": "m", "messages": HI} | fields, ChatRequest)


def refuse(kind, body) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body, kind)
    assert caught.value.status == 400
    return caught.value


def test_what_openai_clients_send_without_wanting_anything_is_taken():
    chat(n=1, presence_penalty=0.0, frequency_penalty=0, logit_bias={}, response_format={"type": "text"})
    chat(user="ann", parallel_tool_calls=True, store=False, metadata=None, stream=None, service_tier="auto")
    parse({"model": "m", "prompt": "a", "best_of": 1, "echo": False, "suffix": None}, CompletionRequest)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"mesages": []}, "mesages", "unknown field 'mesages' (did you mean 'messages'?)"),
        ({"n": 17}, "n", "'n': must be from 1 to 16, found 17"),
        ({"n": 0}, "n", "must be from 1 to 16"),
        ({"n": True}, "n", "valid integer"),
        ({"best_of": 2}, "best_of", "'best_of' is not supported yet; leave it out, or send 1"),
        ({"presence_penalty": 2.1}, "presence_penalty", "must be from -2 to 2, found 2.1"),
        ({"frequency_penalty": -3}, "frequency_penalty", "must be from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty", "must be from -2 to 2, found nan"),
        ({"repetition_penalty": 0}, "repetition_penalty", "must be above 0 and finite"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty", "must be above 0 and finite"),
        ({"min_p": 1.5}, "min_p", "must be from 0 to 1"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"min_tokens": 5, "max_tokens": 4}, None, "'min_tokens' 5 is more than the 4 tokens"),
        ({"min_tokens": 5, "max_completion_tokens": 4}, None, "'min_tokens' 5 is more than the 4 tokens"),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids", "must be a list of token ids, found [3, -1]"),
        ({"stop_token_ids": [True]}, "stop_token_ids", "must be a list of token ids"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids", "must hold at most 64 token ids"),
        ({"logit_bias": [5]}, "logit_bias", "must be an object of at most 1024 token ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "must be an object of at most 1024 token ids"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "keys must be token ids such as '5', found 'five'"),
        ({"logit_bias": {"-5": 1}}, "logit_bias", "keys must be token ids such as '5'"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "the bias of token 5 must be a number from -100 to 100"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "the bias of token 5 must be a number from -100 to 100"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias", "token 5 is named twice"),
        ({"modalities": ["audio"]}, "modalities", "or send ['text']"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "belongs to the type 'json_schema'"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, None, "ask for two forms"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "must hold one of"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1 item"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "unknown field"),
        ({"tool_choice": "required"}, None, "the name of one of 'tools'"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, None, "one of 'tools'"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "must be from 0 to 20, found 21"),
        ({"top_logprobs": 3}, None, "'top_logprobs' needs 'logprobs': true"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2, found 2.5"),
        ({"temperature": "1"}, "temperature", "valid number, found '1'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"temperature": float("nan")}, "temperature", "found nan"),
        ({"top_k": 2**31}, "top_k", "less than 2147483648"),
        ({"seed": 2**63}, "seed", "less than 9223372036854775808"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None, "send one of them"),
        ({"stop": ["a", ""]}, "stop", "none of them empty"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "up to 4 strings"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"stream_options": {"include_usage": True}}, None, "'stream_options' needs 'stream': true"),
        (
            {"stream": True, "stream_options": {"includ_usage": 1}},
            "stream_options.includ_usage",
            "did you mean 'include_usage'?",
        ),
        ({"tool_choice": "some"}, "tool_choice", "'auto', 'none', 'required' or"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "is missing"),
        ({"thinking": "yes"}, "thinking", "valid boolean"),
        ({"thinking": {"type": "on"}}, "thinking", "{'type': 'enabled'}"),
        ({"thinking": True, "chat_template_kwargs": {"thinking": False}}, None, "differ"),
        ({"messages": []}, "messages", "at least 1 item"),
        (
            {"messages": [{"role": "boss", "content": ""}]},
            "messages[0].role",
            "'system', 'user', 'assistant' or 'tool'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0]", "a user message needs 'content'"),
        (
            {"messages": [{"role": "user", "content": "a", "contnt": 1}]},
            "messages[0].contnt",
            "did you mean 'content'?",
        ),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages[0]",
            "'tool_call_id' belongs to every tool message",
        ),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages[0]", "only an assistant"),
    ],
)
def test_refusals_name_the_field(fields, param, says):
    error = refuse(ChatRequest, {"model": "m", "messages": HI} | fields)
    assert error.param == param
    assert says in error.message


def test_a_missing_field_and_a_body_that_is_no_object():
    assert refuse(ChatRequest, {"messages": HI}).message == "'model' is missing"
    assert refuse(ChatRequest, [1]).message == "must be a JSON object"


def test_text_parts_are_joined_and_images_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "ab"
    image = [parts[0], {"type": "image_url", "image_url": {"url": "data:,"}}]
    error = refuse(ChatRequest, {"model": "m", "messages": [*HI, {"role": "user", "content": image}]})
    assert error.param == "messages[1].content"
    assert "part 1 is of type 'image_url'; this server takes text only" in error.message


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"thinking": False}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"chat_template_kwargs": {"thinking": False}}, False),
    ],
)
def test_thinking_is_the_default(fields, thinks):
    assert chat(**fields).thinks is thinks


def test_tools_reach_the_model_as_they_were_sent():
    assert list(chat(tools=[TOOL]).offered_tools[0]["function"]) == ["description", "name", "parameters"]
    assert chat(tools=[TOOL], tool_choice="none").offered_tools == []


def test_an_answer_can_be_sent_back_as_the_client_got_it():
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None}
    result = {"role": "tool", "content": "1", "tool_call_id": "functions.f:0"}
    assert len(chat(messages=[*HI, answer, result]).messages) == 3


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts(prompt, prompts):
    assert parse({"model": "m", "prompt": prompt}, CompletionRequest).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], 5, None, [True], ["a", [1]]])
def test_odd_prompts_are_refused(prompt):
    error = refuse(CompletionRequest, {"model": "m", "prompt": prompt})
    assert error.param == "prompt"
    assert "must be a string, a list of strings, a list of token ids" in error.message


@pytest.mark.parametrize(
    ("field", "value"), [("echo", True), ("logprobs", 21), ("best_of", 17), ("suffix", "x"), ("top_logprobs", 1)]
)
def test_completions_without_support_are_refused(field, value):
    assert refuse(CompletionRequest, {"model": "m", "prompt": "a", field: value}).param == field


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n": 3, "best_of": 2}, "'best_of' 2 is less than 'n' 3"),
        ({"best_of": 2, "stream": True}, "'best_of' above 'n' cannot be streamed"),
    ],
)
def test_best_of_fits_n_and_no_stream(fields, says):
    assert says in refuse(CompletionRequest, {"model": "m", "prompt": "a"} | fields).message


def test_nulls_ask_for_nothing():
    names = ("n", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "top_logprobs")
    request = chat(**dict.fromkeys((*names, "logit_bias", "stop_token_ids", "best_of")))
    assert request == chat()
    assert (request.choices, request.logit_bias, request.stop_token_ids, request.told_logprobs) == (1, (), (), 0)


KEYS = st.one_of(st.integers(0, 200_000).map(str), st.text(max_size=4))
NUMBERS = st.one_of(st.integers(-120, 120), st.floats(), st.booleans(), st.none(), st.text(max_size=2))


@given(st.dictionaries(KEYS, NUMBERS, max_size=5))
def test_a_bias_is_taken_whole_or_refused_by_name(bias: dict[str, object]):
    valid = all(re.fullmatch("[0-9]{1,10}", key) for key in bias) and len(set(map(int, bias))) == len(bias)
    valid = valid and all(type(value) in (int, float) and -100 <= value <= 100 for value in bias.values())
    if valid:
        assert dict(chat(logit_bias=bias).logit_bias) == {int(key): value for key, value in bias.items()}
    else:
        assert refuse(ChatRequest, {"model": "m", "messages": HI, "logit_bias": bias}).param == "logit_bias"


@given(st.lists(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=2)), max_size=5))
def test_stop_token_ids_are_taken_whole_or_refused_by_name(ids: list[object]):
    if all(type(token) is int and token >= 0 for token in ids):
        assert chat(stop_token_ids=ids).stop_token_ids == tuple(ids)
    else:
        assert refuse(ChatRequest, {"model": "m", "messages": HI, "stop_token_ids": ids}).param == "stop_token_ids"
