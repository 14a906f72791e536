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
def server(port: int) -> Iterator[ServerProcess]:
    process = ServerProcess("serve", "--demo", "--port", str(port))
    try:
        process.wait_for("ready in")
        yield process
    finally:
        process.close()


@pytest.fixture(scope="module")
def http(server: ServerProcess, port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: ServerProcess, port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client
