"""vLLM's build for CPUs in bfloat16 in a process of its own, with vLLM's Python: `process_peer` runs this file by its
path, so nothing of flyray is imported.

Arguments: a published folder, threads. One JSON request a line on standard input, one JSON line each as the answer.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

# The worker looks for work without a pause for a second after each step: whoever is measured next waits for its end.
_WORKER_SPINS_S = 1.2
_LONGEST = 4096


class _Model:
    def __init__(self, folder: str) -> None:
        from vllm import LLM  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

        self._model = LLM(
            folder, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=_LONGEST, enable_prefix_caching=False
        )
        with open(os.path.join(folder, "config.json")) as file:
            self._vocabulary: int = json.load(file)["vocab_size"]

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """`Sizes` as a dict -> `decode` and `prefill` of a `Round`."""
        prompt, tokens = request["prefill"], request["decode"]
        decode = {}
        for batch in request["batches"]:
            first, whole = self._seconds(batch, prompt, 1), self._seconds(batch, prompt, tokens)
            decode[batch] = batch * (tokens - 1) / (whole - first)
        answer = {"decode": decode, "prefill": prompt / self._seconds(1, prompt, 1)}
        time.sleep(_WORKER_SPINS_S)
        return answer

    def _seconds(self, batch: int, prompt: int, tokens: int) -> float:
        """Of a batch of random prompts with `tokens` tokens each."""
        from vllm import SamplingParams  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

        prompts = [
            {"prompt_token_ids": [random.randrange(self._vocabulary) for _ in range(prompt)]} for _ in range(batch)
        ]
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        self._model.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin


def main(folder: str, threads: str) -> None:
    # vLLM writes its log to standard output, also from its workers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{int(threads) - 1}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    model = _Model(folder)
    for line in sys.stdin:
        print(json.dumps(model.measure(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
