"""transformers' DeepseekV3ForCausalLM in bfloat16 in a process of its own: `process_peer` runs this file by its path.

Arguments: a published folder, threads. One JSON request a line on standard input, one JSON line each as the answer.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import DeepseekV3ForCausalLM
from transformers.utils import logging


class _Model:
    def __init__(self, folder: str, threads: int) -> None:
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._vocabulary = self._model.config.vocab_size

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """`Sizes` as a dict -> `decode` and `prefill` of a `Round`."""
        prompt, tokens = request["prefill"], request["decode"]
        with torch.inference_mode():
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

    def _run(self, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        output = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values

    def _prompts(self, batch: int, length: int) -> torch.Tensor:
        return torch.randint(self._vocabulary, (batch, length))


def main(folder: str, threads: str) -> None:
    model = _Model(folder, int(threads))
    for line in sys.stdin:
        print(json.dumps(model.measure(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
