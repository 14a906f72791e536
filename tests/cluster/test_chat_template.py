"""Kimi-K2.5's chat format, string by string."""

from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.chat_template import Message, ToolCall, render, render_pieces

USER = Message("user", "Hi")
ASK = "<|im_assistant|>assistant<|im_middle|><think>"
CALL = ToolCall("functions.get_weather:0", '{"city": "Oslo"}')
CALL_TEXT = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>'
)


def test_a_question_with_and_without_thinking():
    assert render([USER], [], thinking=True) == f"<|im_user|>user<|im_middle|>Hi<|im_end|>{ASK}"
    assert render([USER], [], thinking=False) == f"<|im_user|>user<|im_middle|>Hi<|im_end|>{ASK}</think>"


def test_a_system_message_and_names():
    messages = [Message("system", "Be brief."), Message("user", "Hi", name="Ann")]
    expected = "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>Ann<|im_middle|>Hi<|im_end|>"
    assert render(messages, [], thinking=True) == expected + ASK


def test_tools_come_first_as_compact_json():
    tools = [{"type": "function", "function": {"name": "f", "description": "å <b>", "parameters": {"a": [1, 2]}}}]
    expected = (
        '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"f","description":"å <b>",'
        '"parameters":{"a":[1,2]}}}]<|im_end|><|im_user|>user<|im_middle|>Hi<|im_end|>'
    )
    assert render([USER], tools, thinking=True) == expected + ASK


def test_a_finished_answer_loses_its_thinking():
    messages = [USER, Message("assistant", "Hello.", reasoning_content="greet"), Message("user", "Bye")]
    expected = (
        "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>Hello.<|im_end|>"
        "<|im_user|>user<|im_middle|>Bye<|im_end|>"
    )
    assert render(messages, [], thinking=True) == expected + ASK


def test_a_chain_of_tool_calls_keeps_its_thinking():
    messages = [
        Message("user", "Weather?"),
        Message("assistant", reasoning_content="look it up", tool_calls=(CALL,)),
        Message("tool", "sunny", tool_call_id=CALL.id),
    ]
    expected = (
        "<|im_user|>user<|im_middle|>Weather?<|im_end|>"
        f"<|im_assistant|>assistant<|im_middle|><think>look it up</think>{CALL_TEXT}<|im_end|>"
        f"<|im_system|>tool<|im_middle|>## Return of {CALL.id}\nsunny<|im_end|>"
    )
    assert render(messages, [], thinking=True) == expected + ASK


def test_thinking_of_tool_calls_before_the_last_answer_is_dropped():
    messages = [
        USER,
        Message("assistant", reasoning_content="old", tool_calls=(CALL,)),
        Message("tool", "sunny", name="get_weather", tool_call_id=CALL.id),
        Message("assistant", "Sunny.", reasoning_content="old too"),
        Message("user", "And now?"),
        Message("assistant", "Let me see. ", reasoning_content="new", tool_calls=(CALL, CALL)),
    ]
    text = render(messages, [], thinking=True)
    assert "old" not in text
    assert "<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\nsunny<|im_end|>" in text
    assert "<think>new</think>Let me see. <|tool_calls_section_begin|>" in text
    assert text.count("<|tool_call_begin|>") == 3


@given(st.lists(st.text(), min_size=6, max_size=6))
def test_callers_text_stays_apart_and_whole(texts):
    user, name, reasoning, call, arguments, result = texts
    messages = [
        Message("user", user, name=name),
        Message("assistant", reasoning_content=reasoning, tool_calls=(ToolCall(call, arguments),)),
        Message("tool", result, tool_call_id=call),
    ]
    own = [piece.text for piece in render_pieces(messages, [], thinking=True) if not piece.literal]
    expected = [name or "user", user, "assistant", reasoning, call, arguments, "tool", call, result]
    assert own == [text for text in expected if text]
