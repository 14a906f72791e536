"""Pairs of checkpoints for the verifying tests, and ways to damage one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from byte_model import write_byte_model
from deepseek_oracle import (
    QUANTIZATION,
    WRITERS,
    Tensors,
    published_tensors,
    save_checkpoint,
    small_text,
)
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from flyray.cluster.evaluate.settings import EvalSettings
from flyray.cluster.quantize.manifest import SUMS, dump_sums
from flyray.cluster.verify import command
from flyray.cluster.verify.limits import Limits

TOKENIZER = ("tiktoken.model", "tokenizer_config.json")
# In the native format, and what it is compared with.
UP = "model.layers.1.mlp.experts.5.up_proj"
TIGHT = Limits(max_weight_error=0.02, max_row_error=0.03)


def write_native(path: Path) -> DeepseekV3ForCausalLM:
    """The native checkpoint; returns its model."""
    return write_byte_model(path)


def write_as(path: Path, model: DeepseekV3ForCausalLM, native: Path, form: str) -> Path:
    """The model's checkpoint in a format, with the native one's tokenizer, and SHA256SUMS."""
    config = json.loads((native / "config.json").read_text())
    text = small_text(**{key: config[key] for key in ("vocab_size", "max_position_embeddings")})
    save_checkpoint(path, text, published_tensors(model, WRITERS[form]), QUANTIZATION[form])
    for name in TOKENIZER:
        shutil.copy(native / name, path / name)
    return path


def write_sums(path: Path) -> None:
    """SHA256SUMS as `flyray quantize` writes it."""
    files = [file for file in path.iterdir() if file.name != SUMS]
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (path / SUMS).write_bytes(dump_sums(sums))


def change(path: Path, name: str, edit: Callable[[Tensors], None]) -> Path:
    """Lets `edit` change the tensors of the file that has `name`; returns the file."""
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            edit(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
            return file
    raise KeyError(name)


def put(path: Path, name: str, tensor: Tensor) -> None:
    """Replaces one tensor."""
    change(path, name, lambda tensors: tensors.update({name: tensor}))


def flip_bit(file: Path, offset: int, bit: int) -> None:
    """Flips one bit of a file."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(data)


def verify(a: Path | str, b: Path | str | None = None, limits: Limits = TIGHT, engine: bool = False) -> tuple[int, str]:
    """Exit code and report of a verification, without engines unless asked for."""
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    code = command.run(
        str(a),
        None if b is None else str(b),
        limits=limits if b is not None else None,
        text_file="unused",
        tasks_file="unused",
        settings=EvalSettings(),
        engine=engine,
        console=console,
    )
    return code, console.export_text()
