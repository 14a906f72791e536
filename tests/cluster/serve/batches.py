"""Batches as the openai package orders them from the demo's server."""

from __future__ import annotations

import json
from typing import Any

import openai
from openai.types import Batch
from questions import MODEL
from server_process import until

FINAL = ("completed", "failed", "expired", "cancelled")
CHAT = "/v1/chat/completions"


def line(name: str, text: str, **fields: Any) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0} | fields
    return json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body})


def order(client: openai.OpenAI, *lines: str, **fields: Any) -> Batch:
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **fields)


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    until(lambda: client.batches.retrieve(batch.id).status in FINAL, f"{batch.id} ends")
    return client.batches.retrieve(batch.id)


def results(client: openai.OpenAI, file: str | None) -> dict[str, Any]:
    """Each result of a file by its custom_id, of which each stands there once."""
    found = [json.loads(each) for each in client.files.content(file).text.splitlines()] if file else []
    by_name = {each["custom_id"]: each for each in found}
    assert len(by_name) == len(found)
    return by_name
