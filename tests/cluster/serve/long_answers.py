"""Answers that run long enough for something to die meanwhile, in all forms, as their clients get them."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
from questions import MODEL, QUESTION

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
_CHAT = {"model": MODEL, "messages": QUESTION, "max_tokens": 120, "ignore_eos": True}
_TEXT = {"model": MODEL, "prompt": ["The ship", "Once"], "max_tokens": 120, "ignore_eos": True}
_DRAWN = {"temperature": 1.0, "seed": 7}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("/v1/chat/completions", _CHAT | {"temperature": 0, "logprobs": True, "top_logprobs": 2}),
    "drawn": ("/v1/chat/completions", _CHAT | _DRAWN | {"n": 2}),
    "penalties": ("/v1/chat/completions", _CHAT | _DRAWN | {"frequency_penalty": 0.3, "repetition_penalty": 1.1}),
    "text": ("/v1/completions", _TEXT | _DRAWN | {"logprobs": 1, "min_tokens": 90, "stop": ["e", "ship"]}),
    "form": (
        "/v1/completions",
        {"model": MODEL, "prompt": "Once", "max_tokens": 200, "structured_outputs": {"regex": "([0-9]{3} ){40}"}}
        | _DRAWN,
    ),
    "tools": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": "What is the weather in Oslo?"}]}
        | {"tools": [WEATHER], "temperature": 0},
    ),
}


@dataclass
class Choice:
    """What a client knows of one choice at the end; floats are compared to the bit."""

    text: str = ""
    thinking: str = ""
    calls: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None

    def add(self, choice: dict[str, Any]) -> None:
        part = choice.get("delta") or choice.get("message") or {}
        self.text += choice.get("text") or part.get("content") or ""
        self.thinking += part.get("reasoning_content") or ""
        for call in part.get("tool_calls") or ():
            self.calls += (call.get("id") or "") + call["function"]["arguments"]
        told = choice["logprobs"] or {}
        self.logprobs += told.get("content") or []
        self.logprobs += zip(
            *(told.get(name) or [] for name in ("tokens", "token_logprobs", "text_offset")), strict=True
        )
        self.finish = choice["finish_reason"] or self.finish


Answer = tuple[list[Choice], int]
"""The choices and the completion tokens of the usage."""


class Asking:
    """All requests at once, each as a stream and as a whole answer, from the first chunk of every stream on."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._pool = ThreadPoolExecutor(2 * len(REQUESTS))
        self._begun: list[Future[None]] = [Future() for _ in REQUESTS]
        streams = zip(REQUESTS.items(), self._begun, strict=True)
        self._streams = {name: self._pool.submit(self._stream, *asked, begun) for (name, asked), begun in streams}
        self._wholes = {name: self._pool.submit(self._whole, *asked) for name, asked in REQUESTS.items()}
        for begun in self._begun:
            begun.result()

    def answers(self) -> dict[str, Answer]:
        """Of the streams and, under names with "whole" before them, of the others."""
        found = {name: stream.result() for name, stream in self._streams.items()}
        found |= {f"whole {name}": whole.result() for name, whole in self._wholes.items()}
        self._pool.shutdown()
        return found

    def _stream(self, path: str, body: dict[str, Any], begun: Future[None]) -> Answer:
        choices: dict[int, Choice] = {}
        tokens = 0
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._http.stream("POST", path, json=asked) as response:
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    for choice in chunk["choices"]:
                        choices.setdefault(choice["index"], Choice()).add(choice)
                    if not begun.done():
                        begun.set_result(None)
                    tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
        finally:
            if not begun.done():
                begun.set_result(None)
        return [choices[index] for index in sorted(choices)], tokens

    def _whole(self, path: str, body: dict[str, Any]) -> Answer:
        response = self._http.post(path, json=body)
        assert response.status_code == 200, response.text
        found = response.json()
        choices = [Choice() for _ in found["choices"]]
        for choice, each in zip(choices, found["choices"], strict=True):
            choice.add(each)
        return choices, found["usage"]["completion_tokens"]
