"""What a quantizing run will read and write, worked out and checked from headers alone, before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...actors.checkpoint import Checkpoint, read_tensor
from ...actors.expert_format import EXPERT_TENSOR, expert_matrices
from ...actors.safetensors_header import TensorEntry
from ...kernels.formats import PACK
from .matrix import SOURCE_FORMATS, TARGET_FORMATS, QuantizeError, TensorSpec, check_columns, output_specs


@dataclass(frozen=True)
class MatrixPlan:
    """One routed expert's matrix. name is without the checkpoint's prefix, kind is gate_proj, up_proj or down_proj."""

    name: str
    kind: str
    rows: int
    columns: int
    source: Mapping[str, TensorEntry]

    def read(self) -> dict[str, Any]:
        """The source tensors by the last part of their names; they may lie in several files."""
        return {part: read_tensor(f"{self.name}.{part}", entry) for part, entry in self.source.items()}


@dataclass(frozen=True)
class FilePlan:
    """One output file: tensors copied as they are, matrices to quantize, and the header (by stored names, in order)."""

    target: Path
    format: str
    source_format: str
    prefix: str
    config: Mapping[str, Any]
    copies: Mapping[str, TensorEntry]
    matrices: tuple[MatrixPlan, ...]
    specs: Mapping[str, TensorSpec]

    @property
    def source_bytes(self) -> int:
        matrices = sum(entry.bytes for matrix in self.matrices for entry in matrix.source.values())
        return matrices + sum(entry.bytes for entry in self.copies.values())


@dataclass(frozen=True)
class QuantizePlan:
    """A whole run. unquantized: stored names of the Linear modules that are copied, for config.json."""

    source: Path
    target: Path
    format: str
    source_format: str
    config: Mapping[str, Any]
    unquantized: tuple[str, ...]
    files: tuple[FilePlan, ...]

    @property
    def source_bytes(self) -> int:
        return sum(file.source_bytes for file in self.files)

    @property
    def target_bytes(self) -> int:
        return sum(spec.bytes for file in self.files for spec in file.specs.values())


def plan_quantization(checkpoint: Checkpoint, target: Path, format: str) -> QuantizePlan:
    """Raises QuantizeError for an unknown format, a source that is already quantized, or a matrix that does not fit
    the format (by name); CheckpointError for a source that cannot be read."""
    if format not in TARGET_FORMATS:
        raise QuantizeError(f"unknown format {format!r}; known are {', '.join(TARGET_FORMATS)}")
    source_format = checkpoint.expert_format()
    if source_format not in SOURCE_FORMATS:
        raise QuantizeError(
            f"{checkpoint.path} is already quantized to {source_format}; "
            "quantize the native (compressed-tensors INT4) or the bf16 checkpoint instead"
        )
    matrices = _matrices(checkpoint, source_format, format)
    return QuantizePlan(
        source=checkpoint.path,
        target=target,
        format=format,
        source_format=source_format,
        config=checkpoint.config,
        unquantized=_unquantized_linears(checkpoint),
        files=tuple(_files(checkpoint, target, format, source_format, matrices)),
    )


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuses a target that is the source, is a file, or has anything in it (unless `overwrite`)."""
    if source.resolve() == target.resolve():
        raise QuantizeError(f"{target}: source and target are the same folder")
    if target.exists() and not target.is_dir():
        raise QuantizeError(f"{target}: is a file, not a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise QuantizeError(f"{target}: is not empty; pass --overwrite to replace the checkpoint in it")


def check_space(target: Path, needed: int) -> None:
    """Refuses a run that the disk of `target` certainly cannot hold."""
    existing = next(folder for folder in (target, *target.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise QuantizeError(f"{target}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _matrices(checkpoint: Checkpoint, source_format: str, format: str) -> dict[str, MatrixPlan]:
    entries = {name: checkpoint.entry(name) for name in checkpoint.names}
    plans: dict[str, MatrixPlan] = {}
    for matrix, parts in expert_matrices(entries).items():
        rows, width = parts[_anchor(source_format)].shape
        columns = width * PACK if source_format == "w4a16" else width
        if "weight_shape" in parts:
            stated = tuple(checkpoint.read(f"{matrix}.weight_shape").tolist())
            if stated != (rows, columns):
                raise QuantizeError(
                    f"{matrix}.weight_shape says {list(stated)}, but weight_packed holds {[rows, columns]}; "
                    "padded matrices cannot be quantized"
                )
        check_columns(matrix, columns, source_format, format)
        plans[matrix] = MatrixPlan(matrix, matrix.rpartition(".")[2], rows, columns, parts)
    return plans


def _files(
    checkpoint: Checkpoint, target: Path, format: str, source_format: str, matrices: Mapping[str, MatrixPlan]
) -> list[FilePlan]:
    """Output files keep their source's names. A matrix goes where its weight lies, whatever file holds its scales; a
    source file of nothing but scales has no output file."""
    copies: dict[str, dict[str, TensorEntry]] = {}
    owned: dict[str, list[MatrixPlan]] = {}
    specs: dict[str, dict[str, TensorSpec]] = {}
    for name in checkpoint.names:
        entry = checkpoint.entry(name)
        match = EXPERT_TENSOR.fullmatch(name)
        stored = checkpoint.stored_name(name)
        if match is None:
            copies.setdefault(entry.file.name, {})[stored] = entry
            specs.setdefault(entry.file.name, {})[stored] = TensorSpec(entry.dtype, entry.shape)
        elif match["part"] == _anchor(source_format):
            matrix = matrices[match["matrix"]]
            owned.setdefault(entry.file.name, []).append(matrix)
            outputs = output_specs(format, matrix.rows, matrix.columns)
            specs.setdefault(entry.file.name, {}).update(
                {f"{checkpoint.prefix}{matrix.name}.{part}": spec for part, spec in outputs.items()}
            )
    return [
        FilePlan(
            target=target / file,
            format=format,
            source_format=source_format,
            prefix=checkpoint.prefix,
            config=checkpoint.config,
            copies=copies.get(file, {}),
            matrices=tuple(owned.get(file, ())),
            specs=file_specs,
        )
        for file, file_specs in sorted(specs.items())
    ]


def _unquantized_linears(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What Quark's file-to-file export lists as excluded: every module with a `weight` of two or more dimensions that
    is neither a norm nor an embedding, by stored name."""
    modules: list[str] = []
    for name in checkpoint.names:
        module, _, part = checkpoint.stored_name(name).rpartition(".")
        is_linear = part == "weight" and not module.endswith("norm") and "embed" not in module
        if is_linear and len(checkpoint.entry(name).shape) >= 2 and not EXPERT_TENSOR.fullmatch(name):
            modules.append(module)
    return tuple(sorted(modules))


def _anchor(source_format: str) -> str:
    return "weight_packed" if source_format == "w4a16" else "weight"
