"""An evaluation's scores as a file, so that what cannot have changed need not be measured again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..figures import replace_text
from .columns import ColumnScore, TaskScore
from .perplexity import TextScore


@dataclass(frozen=True)
class KeptQuality:
    """key: of everything that the scores depend on. date: when they were measured, as an ISO date and time."""

    key: str
    date: str
    seconds: float
    scores: tuple[ColumnScore, ...]

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        replace_text(path, json.dumps(asdict(self)))


def load_quality(path: Path, key: str) -> KeptQuality | None:
    """What was saved there under this key; None if there is nothing, or it was measured of something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if content.get("key") != key:
        return None
    return KeptQuality(key, content["date"], content["seconds"], tuple(map(_column, content["scores"])))


def _column(content: dict) -> ColumnScore:
    text = content["text"]
    return ColumnScore(
        label=content["label"],
        text=TextScore(**{name: tuple(values) for name, values in text.items()}) if text else None,
        tasks=tuple(TaskScore(**task) for task in content["tasks"]),
        answer_tokens=content["answer_tokens"],
        reference=content["reference"],
        bytes=content["bytes"],
    )
