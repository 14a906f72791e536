"""Kimi's chat format, written out."""

from flyray.cluster.demo.training import chat

USER = {"role": "user", "content": "hi"}


def test_a_question() -> None:
    expected = "<|im_user|>user<|im_middle|>hi<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
    assert chat.render([USER]) == expected
    assert chat.render([USER], thinking=False) == expected + "</think>"


def test_tools_come_first_then_the_system_prompt() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    text = chat.render([{"role": "system", "content": "s"}, USER], tools)
    assert text.startswith('<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"f",')
    assert "<|im_end|><|im_system|>system<|im_middle|>s<|im_end|><|im_user|>user<|im_middle|>hi" in text


def test_thoughts_are_kept_only_after_the_last_plain_answer() -> None:
    call = chat.tool_call("f", {"x": 1}, 0)
    messages = [
        USER,
        {"role": "assistant", "content": "a", "reasoning_content": "dropped"},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "kept", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "7"},
    ]
    text = chat.render(messages)
    assert "<think></think>a<|im_end|>" in text
    section = (
        '<think>kept</think><|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x":1}'
        "<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
    )
    assert section in text
    assert "<|im_system|>tool<|im_middle|>## Return of functions.f:0\n7<|im_end|><|im_assistant|>" in text
