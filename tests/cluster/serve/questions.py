"""What tests ask the demo's server."""

from __future__ import annotations

import httpx

MODEL = "kimi-k2.5-nano"
QUESTION = [{"role": "user", "content": "What is 125 + 377?"}]


def chat(http: httpx.Client, **fields) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": MODEL, "messages": QUESTION} | fields)
