"""Short proofs of what a run was made from: its source, its inputs and its code."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from ...actors.checkpoint import Checkpoint
from ..code_version import code_version
from .location import Location
from .plan_inputs import QuantizeInputs
from .recipe import Recipe

CODE = (
    "cluster.quantize",
    "cluster.sensitivity.sensitivity",
    "kernels",
    "actors.checkpoint",
    "actors.expert_format",
    "actors.quantization_config",
    "actors.safetensors_header",
    "actors.statistics",
    "actors.statistics_plan",
    "actors.storage",
    "actors.weight_formats",
)
"""What decides the bytes of a quantized checkpoint. Recipes and configuration files are compared by their content."""
_PACKAGES = ("torch", "amd-quark", "compressed-tensors")
_SAMPLES = 4
_SAMPLE_BYTES = 64 << 10


def source_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over config.json, every tensor's name, dtype, shape and place (so every header), every file's size, and
    four samples of 64 KB of every file: enough to tell apart what is not the same checkpoint, in seconds."""
    whole = hashlib.sha256()
    whole.update((checkpoint.path / "config.json").read_bytes())
    for name in checkpoint.names:
        entry = checkpoint.entry(name)
        line = f"{checkpoint.stored_name(name)}\0{entry.file.name}\0{entry.dtype}\0{entry.shape}\0{entry.begin}\n"
        whole.update(line.encode())
    for file in checkpoint.files:
        whole.update(sample_digest(file).encode())
    return whole.hexdigest()


def inputs_digests(inputs: QuantizeInputs) -> dict[str, str]:
    """What each given input was: the SHA-256 of a sensitivity file, one over samples of a calibration's files (which
    may be tens of gigabytes), the budget as it is."""
    found = {"budget": inputs.budget} if inputs.budget is not None else {}
    if inputs.sensitivity is not None:
        found["sensitivity"] = hashlib.sha256(inputs.sensitivity.read_bytes()).hexdigest()
    if inputs.calibration is not None:
        files = sorted(path for path in inputs.calibration.iterdir() if path.is_file())
        parts = "".join(f"{file.name}\0{sample_digest(file)}\n" for file in files)
        found["calibration"] = hashlib.sha256(parts.encode()).hexdigest()
    return found


def code_fingerprint(recipe: Recipe) -> str:
    """Of flyray's code, and of the packages whose numbers go in."""
    packages = _PACKAGES if any(scheme.by == "quark" for scheme in recipe.schemes()) else _PACKAGES[:1]
    return " ".join([code_version(*CODE), *(f"{package}={metadata.version(package)}" for package in packages)])


def sample_digest(file: Location) -> str:
    """SHA-256 over a file's size and samples at equal distances, its beginning and its end among them."""
    size = file.stat().st_size
    whole = hashlib.sha256(str(size).encode())
    for begin in sorted({max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1) for index in range(_SAMPLES)}):
        if isinstance(file, Path):
            with file.open("rb") as stream:
                stream.seek(begin)
                whole.update(stream.read(_SAMPLE_BYTES))
        else:
            end = min(size, begin + _SAMPLE_BYTES)
            data = file.fs.cat_file(file.path, start=begin, end=end)
            assert isinstance(data, bytes)
            whole.update(data)
    return whole.hexdigest()
