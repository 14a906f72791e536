"""transformers' DeepseekV3ForCausalLM in bfloat16 as a peer: a process of its own, which this file also runs in.

The process reads one JSON request a line and answers with one JSON line each.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .rounds import BenchError, BenchUsageError, Round, Sizes

INSTALL = "pip install 'transformers>=5,<6'"


class TransformersPeer:
    """A process that holds the model."""

    name = "transformers"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    async def measure(self, sizes: Sizes) -> Round:
        answer = await asyncio.to_thread(self._ask, asdict(sizes))
        return Round({int(batch): rate for batch, rate in answer["decode"].items()}, answer["prefill"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        pipes = self._process.stdin, self._process.stdout
        if pipes[0] is None or pipes[1] is None:
            raise BenchError(f"{self.name}: its process has no pipes")
        print(json.dumps(request), file=pipes[0], flush=True)
        line = pipes[1].readline()
        if not line:
            raise BenchError(f"{self.name}: its process ended with exit code {self._process.wait()}; see above")
        return json.loads(line)


def check_installed() -> None:
    """Raises BenchUsageError where it cannot run."""
    if find_spec("transformers") is None:
        raise BenchUsageError(f"peer transformers: it is not installed here; install it with: {INSTALL}")


@contextmanager
def transformers_peer(folder: Path, threads: int) -> Iterator[TransformersPeer]:
    """The peer with the weights of `folder` (`published_folder`), ended with the context."""
    command = [sys.executable, "-m", __name__, str(folder), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield TransformersPeer(process)
        finally:
            process.kill()


class _Model:
    """The model in the peer's own process."""

    def __init__(self, folder: str, threads: int) -> None:
        import torch
        from transformers import DeepseekV3ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        self._model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._vocabulary = self._model.config.vocab_size

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """`Sizes` as a dict -> `decode` and `prefill` of a `Round`."""
        prompt, tokens = request["prefill"], request["decode"]
        with self._torch.inference_mode():
            decode = {batch: self._decode(batch, prompt, tokens) for batch in request["batches"]}
            begin = time.perf_counter()
            self._run(self._prompts(1, prompt), None)
            return {"decode": decode, "prefill": prompt / (time.perf_counter() - begin)}

    def _decode(self, batch: int, prompt: int, tokens: int) -> float:
        """Tokens a second of the steps after the one that the prompt and the first token run in."""
        token, cache = self._run(self._prompts(batch, prompt), None)
        token, cache = self._run(token, cache)
        begin = time.perf_counter()
        for _ in range(tokens - 2):
            token, cache = self._run(token, cache)
        return batch * (tokens - 2) / (time.perf_counter() - begin)

    def _run(self, tokens: Any, cache: Any) -> tuple[Any, Any]:
        output = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values

    def _prompts(self, batch: int, length: int) -> Any:
        return self._torch.randint(self._vocabulary, (batch, length))


def serve(folder: str, threads: int) -> None:
    """The peer's process: answers requests until its input ends."""
    model = _Model(folder, threads)
    for line in sys.stdin:
        print(json.dumps(model.measure(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
