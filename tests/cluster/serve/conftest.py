"""The demo's server, a process of each module that talks to one, and its clients."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from server_process import PATIENCE_S, ServerProcess

from flyray.cluster.held_port import HeldPort


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with HeldPort() as held:
        yield held.number


@pytest.fixture(scope="module")
def api_key() -> str:
    """What clients send; a module whose server asks for a key has a fixture of its own."""
    return "none"


@pytest.fixture(scope="module")
def arguments(port: int) -> list[str]:
    """Of `flyray serve`; a module that serves something else has a fixture of its own."""
    return ["--demo", "--port", str(port)]


@pytest.fixture(scope="module")
def server(arguments: list[str]) -> Iterator[ServerProcess]:
    process = ServerProcess("serve", *arguments)
    try:
        process.wait_for("ready in")
        yield process
    finally:
        process.close()


@pytest.fixture(scope="module")
def http(server: ServerProcess, port: int, api_key: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {api_key}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: ServerProcess, port: int, api_key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client
