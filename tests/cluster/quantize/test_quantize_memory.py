"""A file much larger than a worker's memory: what the process really takes stays below."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from source_checkpoints import NATIVE_QUANTIZATION, write_checkpoint

WORK = """
import json, sys
from pathlib import Path
import torch
from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.quantize.file_task import WorkSettings, quantize_files
from flyray.cluster.quantize.memory import MemoryBudget, parse_memory
from flyray.cluster.quantize.plan import plan_quantization
from flyray.cluster.quantize.plan_inputs import QuantizeInputs
from flyray.cluster.quantize.recipe import load_recipe

torch.set_num_threads(1)
source, target, recipe, memory = sys.argv[1:]
Path(target).mkdir()
plan = plan_quantization(Checkpoint(source), Path(target), "label", load_recipe(recipe), QuantizeInputs())
*_, last = quantize_files(plan.files, WorkSettings(MemoryBudget(parse_memory(memory))))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"baseline": last.record.baseline, "peak": int(status["VmHWM"].split()[0]) << 10,
                  "told": last.record.peak_memory, "sha256": last.record.sha256}))
"""
MEMORY = "192 MiB"
ROWS, COLUMNS = 98_304, 4096
"""Of a matrix: 201 MB of nibbles, 25 MB of scales."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of 360 MB, with a matrix of 226 MB and a copied tensor of 134 MB."""
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.1.mlp.experts.0.up_proj"
    tensors = {
        "model.embed_tokens.weight": torch.zeros(1 << 15, 2048, dtype=torch.bfloat16),
        f"{name}.weight_packed": torch.randint(-(2**31), 2**31 - 1, (ROWS, COLUMNS // 8), generator=generator).int(),
        f"{name}.weight_scale": (0.01 + torch.rand(ROWS, COLUMNS // 32, generator=generator)).bfloat16(),
    }
    folder = tmp_path_factory.mktemp("large")
    return write_checkpoint(folder / "source", {"model.safetensors": tensors}, NATIVE_QUANTIZATION)


def run(source: Path, target: Path, recipe: str, memory: str) -> dict[str, int]:
    command = [sys.executable, "-c", WORK, str(source), str(target), recipe, memory]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    return json.loads(ended.stdout)


@pytest.mark.parametrize("recipe", ["w4a8", "plain.yaml"])
def test_a_matrix_larger_than_the_memory_goes_through_in_rows(large: Path, tmp_path: Path, recipe: str) -> None:
    if recipe == "plain.yaml":
        recipe = str(tmp_path / recipe)
        Path(recipe).write_text("version: 1\nrules: [{modules: ['*.experts.*'], format: w8a8}]\n")
    small = run(large, tmp_path / "small", recipe, MEMORY)
    assert small["peak"] - small["baseline"] < 192 << 20
    assert small["told"] <= small["peak"]
    content = (tmp_path / "small" / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == small["sha256"]
    whole = run(large, tmp_path / "whole", recipe, "8 GB")
    assert whole["sha256"] == small["sha256"]
