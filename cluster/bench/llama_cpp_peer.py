"""llama.cpp as a peer: each round runs `llama-batched-bench` and reads its lines of JSON."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..scratch_folder import scratch_folder
from .gguf_file import write_gguf
from .rounds import BenchError, BenchUsageError, Round, Sizes

BENCH = "llama-batched-bench"
QUANTIZE = "llama-quantize"
_SCRATCH = "bench-gguf-"
_ERROR_LINES = 5


@dataclass(frozen=True)
class LlamaCppPeer:
    """llama.cpp with a GGUF file. Versions of before 2026 run token 0 alone, which touches fewer experts than text."""

    gguf: Path
    threads: int

    async def measure(self, sizes: Sizes) -> Round:
        return parse_llama_cpp(await asyncio.to_thread(_run, self.command(sizes)), sizes)

    def command(self, sizes: Sizes) -> list[str]:
        """One run of all batch sizes, and of one sequence for the prefill rate."""
        context = max(sizes.batches) * (sizes.prefill + sizes.decode)
        batches = ",".join(map(str, dict.fromkeys((1, *sizes.batches))))
        arguments = ["-m", self.gguf, "-c", context, "-b", max(2048, sizes.prefill), "-ub", max(512, sizes.prefill)]
        arguments += ["-npp", sizes.prefill, "-ntg", sizes.decode, "-npl", batches]
        arguments += ["-t", self.threads, "-tb", self.threads, "--output-format", "jsonl"]
        return [BENCH, *map(str, arguments)]


def check_llama_cpp() -> None:
    """Raises BenchUsageError where it cannot run."""
    for command in (BENCH, QUANTIZE):
        if shutil.which(command) is None:
            raise BenchUsageError(
                f"peer llama.cpp: {command} is not on the PATH; build it from llama.cpp's source: "
                f"cmake -B build && cmake --build build --target {BENCH} {QUANTIZE}"
            )


def quantized_gguf(folder: Path, type: str) -> Path:
    """The weights of a published folder in a type of llama-quantize ("Q4_0"), in a file beside it, made once.

    Raises BenchError for a type that llama-quantize does not know, and what `write_gguf` raises.
    """
    kept = folder.with_name(f"{folder.name}-{type}.gguf")
    if not kept.exists():
        with scratch_folder(folder.parent, _SCRATCH) as scratch:
            whole, made = scratch / "whole.gguf", scratch / "made.gguf"
            write_gguf(folder, whole)
            _run([QUANTIZE, str(whole), str(made), type])
            made.rename(kept)
    return kept


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
        raise BenchError(f"{BENCH} printed nothing of batch {missing[0]}")
    return Round({batch: found[batch]["speed_tg"] for batch in sizes.batches}, found[1]["speed_pp"])


def _run(command: Sequence[str]) -> str:
    """What a command prints. Raises BenchError with the end of its errors."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-_ERROR_LINES:])
        raise BenchError(f"{command[0]} ended with exit code {done.returncode}:\n{last}")
    return done.stdout
