"""One checkpoint by itself: checksums of its files, its metadata, tensors and tokenizer, and that values are finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from ...actors.checkpoint import Checkpoint, CheckpointError
from ...actors.engine_config import EngineConfig
from ...actors.engine_shape import EngineShape
from ...actors.model.config import ModelConfig
from ...actors.precision import PrecisionError
from ..quantize.manifest import SUMS, check_sums
from ..tokenizer import Tokenizer, TokenizerError
from .check import Check, some
from .target import Target, VerifyError

VOCABULARY, SETTINGS = "tiktoken.model", "tokenizer_config.json"
CHUNK_BYTES = 64 << 20
"""Of a tensor in memory at a time."""

Progress = Callable[[str], None]
"""Called with the name of each tensor, or matrix, before it is read."""


def sums_check(target: Target) -> Check:
    """Every file's SHA-256 against SHA256SUMS, which not every checkpoint has."""
    name = f"{target.name} checksums"
    if not (target.path / SUMS).is_file():
        return Check(name, f"there is no {SUMS} in {target.path}, so files were not compared with one", None)
    wrong = check_sums(target.path)
    if wrong:
        return Check(name, f"not as in {SUMS}: {some(wrong, 8)}", False)
    return Check(name, f"all files are as in {SUMS}", True)


def open_target(target: Target) -> tuple[Checkpoint | None, Check]:
    """Opens the files' headers, which shows truncated files and tensors that the index has and the files have not."""
    name = f"{target.name} files"
    try:
        checkpoint = Checkpoint(target.path)
    except CheckpointError as error:
        return None, Check(name, str(error), False)
    size = sum(checkpoint.entry(tensor).bytes for tensor in checkpoint.names)
    files = f"{len(checkpoint.files)} file{'s' if len(checkpoint.files) > 1 else ''}"
    return checkpoint, Check(name, f"{len(checkpoint.names)} tensors in {files}, {size / 1e9:.3f} GB", True)


def tensors_check(target: Target, backend: str = "cpu") -> tuple[ModelConfig | None, Check]:
    """Every tensor that the model needs, by its header: name, shape, dtype; and that config.json says the same.

    Raises VerifyError for a precision that the checkpoint cannot be loaded in.
    """
    name = f"{target.name} tensors"
    try:
        shape = EngineShape.read(EngineConfig(str(target.path), precision=target.precision, backend=backend))
    except PrecisionError as error:
        raise VerifyError(f"{target}: {error}") from None
    except (CheckpointError, ValueError) as error:
        return None, Check(name, str(error), False)
    layers, experts = shape.model.num_hidden_layers, shape.model.n_routed_experts
    return shape.model, Check(name, f"all of {layers} layers of {experts} experts are there, as config.json says", True)


def tokenizer_check(target: Target, model: ModelConfig) -> Check:
    """The tokenizer loads and its ids are the model's."""
    name = f"{target.name} tokenizer"
    try:
        tokenizer = Tokenizer(target.path)
    except TokenizerError as error:
        return Check(name, str(error), False)
    vocabulary = model.vocab_size
    if tokenizer.size > vocabulary:
        detail = f"tiktoken.model has ids up to {tokenizer.size - 1}, the model's vocab_size is {vocabulary}"
        return Check(name, detail, False)
    ids = Checkpoint(target.path).config
    text = ids.get("text_config") or ids
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(token := text.get(key), int) and not 0 <= token < tokenizer.size:
            return Check(
                name, f"config.json's {key} is {token}, tiktoken.model has ids up to {tokenizer.size - 1}", False
            )
    return Check(name, f"{tokenizer.size} ids of a vocabulary of {vocabulary}", True)


def finite_check(target: Target, checkpoint: Checkpoint, progress: Progress) -> Check:
    """No value of any tensor is NaN or infinite, and no scale is negative. Reads everything, in bounded pieces."""
    name = f"{target.name} values"
    wrong: list[str] = []
    for tensor in checkpoint.names:
        progress(tensor)
        if problem := _problem(checkpoint, tensor):
            wrong.append(f"{tensor} ({problem})")
    if wrong:
        return Check(name, some(wrong), False)
    return Check(name, "no NaN, no infinity, no negative scale", True)


def _problem(checkpoint: Checkpoint, name: str) -> str:
    """What is wrong with a tensor's values, or "". Raises CheckpointError when the file has changed meanwhile."""
    entry = checkpoint.entry(name)
    if not entry.dtype.is_floating_point:
        return ""
    is_scale = "weight_scale" in name.rpartition(".")[2]
    for first, values in row_chunks(checkpoint, name):
        finite = values.float().isfinite()
        if not bool(finite.all()):
            row = first + int((~finite).reshape(len(values), -1).any(1).nonzero()[0]) if values.dim() else 0
            return f"not finite in row {row}"
        if is_scale and bool((values < 0).any()):
            return "a negative scale"
    return ""


def row_chunks(checkpoint: Checkpoint, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, Tensor]]:
    """A tensor's rows in pieces of about `chunk_bytes`, each with the number of its first row; a scalar whole."""
    entry = checkpoint.entry(name)
    if not entry.shape:
        yield 0, checkpoint.read(name)
        return
    rows = entry.shape[0]
    row_bytes = max(1, math.prod(entry.shape[1:]) * entry.dtype.itemsize)
    step = max(1, chunk_bytes // row_bytes)
    for first in range(0, rows, step):
        yield first, checkpoint.read_rows(name, first, min(rows, first + step))


def same_tokenizer(a: Path, b: Path) -> Check:
    """Both give text the same ids: checkpoints with other ones can neither be compared nor stand in for each other."""
    one, other = Tokenizer(a), Tokenizer(b)
    differing = []
    if (a / VOCABULARY).read_bytes() != (b / VOCABULARY).read_bytes():
        differing.append(VOCABULARY)
    names = sorted({*one.special, *other.special})
    settings = [name for name in names if one.special.get(name) != other.special.get(name)]
    if _pattern(a) != _pattern(b):
        settings.append("pat_str")
    if settings:
        differing.append(f"{SETTINGS} ({some(settings)})")
    if differing:
        return Check("tokenizers", f"A and B differ in {' and '.join(differing)}", False)
    return Check("tokenizers", f"A and B give the same {one.size} ids", True)


def _pattern(path: Path) -> str | None:
    return json.loads((path / SETTINGS).read_text(encoding="utf-8")).get("pat_str")


def same_model(a: ModelConfig, b: ModelConfig) -> Check:
    """Both have one architecture, so that their tensors and texts can be compared."""
    names = [name for name in vars(a) if getattr(a, name) != getattr(b, name)]
    if names:
        pairs = [f"{name} ({getattr(a, name)} and {getattr(b, name)})" for name in names]
        return Check("architecture", f"A and B differ in {some(pairs)}", False)
    return Check("architecture", "A and B are of one model", True)
