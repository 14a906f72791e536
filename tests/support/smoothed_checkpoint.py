"""A small unquantized checkpoint, and the same with smoothing folded into its tensors, neither of them rounded."""

from __future__ import annotations

from pathlib import Path

from deepseek_oracle import save_checkpoint
from mixed_checkpoint import TEXT, dense_tensors

from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.quantize.calibrated import Calibrated


def write_plain(path: Path, seed: int = 0) -> Path:
    return save_checkpoint(path, TEXT, dense_tensors(seed), None)


def write_smoothed(path: Path, source: Path, calibrated: Calibrated) -> Path:
    """The source with every tensor multiplied as `calibrated` says."""
    checkpoint = Checkpoint(source)
    tensors = {}
    for name in checkpoint.names:
        factor, tensor = calibrated.copied(name), checkpoint.read(name)
        tensors[name] = tensor if factor is None else (tensor.float() * factor).to(tensor.dtype)
    return save_checkpoint(path, TEXT, tensors, None)
