"""Tasks: how their file is read, which are chosen, and when an answer is right."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from flyray.cluster.evaluate.score import Call, Task, TaskError, choose, read_tasks

USER = {"role": "user", "content": "What is 2 + 3?"}


def task(**fields: Any) -> dict[str, Any]:
    return {"family": "add", "split": "operands", "messages": [USER], "answer": "5", **fields}


def read(tmp_path: Path, *contents: Any) -> list[Task]:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n\n".join(content if isinstance(content, str) else json.dumps(content) for content in contents))
    return list(read_tasks(path))


def message(content: str | None, *calls: tuple[str, str]) -> dict[str, Any]:
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    made = [{"id": "functions.f:0", "type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": content} | ({"tool_calls": made} if made else {})


def test_content_must_be_exactly_the_answer(tmp_path: Path) -> None:
    [sum_task] = read(tmp_path, task())
    assert sum_task.is_right(message("5"))
    assert sum_task.is_right(message(" 5\n"))
    for wrong in [message("5."), message("It is 5"), message(""), message(None), message("5", ("add", "{}"))]:
        assert not sum_task.is_right(wrong)


def test_calls_must_be_exactly_the_calls(tmp_path: Path) -> None:
    wanted = [{"name": "book", "arguments": '{"city":"Oslo","n":2}'}]
    [call_task] = read(tmp_path, task(answer=wanted, tools=[{"type": "function"}]))
    assert call_task.answer == (Call("book", {"city": "Oslo", "n": 2}),)
    assert call_task.is_right(message(None, ("book", '{ "n": 2, "city": "Oslo" }')))
    for wrong in [
        message("done"),
        message("done", ("book", '{"city":"Oslo","n":2}')),
        message(None, ("book", '{"city":"Oslo","n":"2"}')),
        message(None, ("book", '{"city":"Oslo","n":2.0}')),
        message(None, ("book", '{"city":"Oslo","n":true}')),
        message(None, ("book", '{"city":"Oslo"')),
        message(None, ("cook", '{"city":"Oslo","n":2}')),
        message(None, ("book", '{"city":"Oslo","n":2}'), ("book", '{"city":"Oslo","n":2}')),
    ]:
        assert not call_task.is_right(wrong)


def test_request_is_greedy_and_says_whether_to_think(tmp_path: Path) -> None:
    prompt = "<|im_assistant|>assistant<|im_middle|><think></think>"
    thinks, told, rendered = read(tmp_path, task(), task(thinking=False), task(prompt=prompt))
    assert [thinks.thinking, told.thinking, rendered.thinking] == [True, False, False]
    body = thinks.request("nano", 50)
    assert body == {
        "model": "nano",
        "messages": [USER],
        "temperature": 0,
        "max_tokens": 50,
        "thinking": True,
    }
    [with_tools] = read(tmp_path, task(tools=[{"type": "function"}]))
    assert with_tools.request("nano", 50)["tools"] == [{"type": "function"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "line 3: Expecting"),
        ([], "line 3: must be a JSON object"),
        (task(familly="x"), "line 3: familly: unknown field"),
        (task(family=""), "line 3: family: must be a non-empty string"),
        (task(split=1), "line 3: split: must be a string"),
        (task(messages=[]), "line 3: messages: must hold at least one"),
        (task(messages=["hi"]), "line 3: messages: must be a list of objects"),
        (task(tools={}), "line 3: tools: must be a list"),
        (task(thinking=1), "line 3: thinking: must be true or false"),
        (task(answer=5), "line 3: answer: must be a string, or a list of calls"),
        (task(answer=[{"name": "f"}]), "line 3: answer: each call must have just name and arguments"),
        (task(answer=[{"name": "f", "arguments": "{"}]), "line 3: Expecting"),
    ],
)
def test_bad_tasks_are_named(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        read(tmp_path, task(), content)


def test_compressed_file(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps(task()).encode()))
    assert next(read_tasks(path)).family == "add"


def test_choose_takes_families_alike_and_splits_in_turns(tmp_path: Path) -> None:
    contents = [task(answer=f"o{number}") for number in range(5)]
    contents += [task(split="phrasings", answer="p0"), task(split="phrasings", answer="p1")]
    contents += [task(family="copy", answer="c0")]
    tasks = read(tmp_path, *contents)
    assert [chosen.answer for chosen in choose(tasks, 3)] == ["o0", "p0", "o1", "c0"]
    assert [chosen.answer for chosen in choose(tasks, 6)] == ["o0", "p0", "o1", "p1", "o2", "o3", "c0"]
    assert len(choose(tasks, 100)) == len(tasks)
    assert choose(tasks, 0) == []
