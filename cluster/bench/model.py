"""The model that is measured: a checkpoint's folder, or a shipped shape with random weights, made once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ...actors.checkpoint import Checkpoint
from ..scratch_folder import scratch_folder
from ..synthesize import Synthesis, models, synthesize

_SCRATCH = "bench-model-"


def find_model(name: str, work_dir: Path, say: Callable[[str], None]) -> Path:
    """The folder of a checkpoint: `name` itself, or one of random weights in the shape `name`, kept in work_dir.

    A folder of a kept one is named by all that decides its content. Raises CheckpointError for a folder that is none,
    SynthesizeError for a name that is no shape, SpaceError where the disk is too small.
    """
    if Path(name).is_dir():
        Checkpoint(name)
        return Path(name)
    what = Synthesis(name)
    whole = json.dumps([asdict(what), what.config()], sort_keys=True)
    kept = work_dir / f"{Path(name).stem}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"
    if not kept.exists():
        say(f"{name}: making random weights in {kept}")
        _make(what, kept)
    return kept


def model_label(name: str) -> str:
    """What the model is called in tables."""
    return name if name in models() else Path(name).resolve().name


def _make(what: Synthesis, kept: Path) -> None:
    """Makes the folder whole or not at all, whoever else makes it meanwhile."""
    with scratch_folder(kept.parent, _SCRATCH) as scratch:
        made = scratch / "model"
        synthesize(made, what, progress=False)
        try:
            os.rename(made, kept)
        except OSError:
            if not kept.exists():
                raise
            shutil.rmtree(made)
