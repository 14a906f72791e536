"""The demo's packaged files."""

from __future__ import annotations

from pathlib import Path

from ..config import DEMO_MODEL

__all__ = ["DEMO_CALIBRATION", "DEMO_MODEL", "DEMO_TASKS", "DEMO_TEXT", "NAME"]

NAME = DEMO_MODEL.name
_DATA = Path(__file__).parent / "data"
# Never trained on. Text: {"source", "group", "text"} a line; tasks: see `score.Task`.
DEMO_TEXT = _DATA / "heldout.jsonl.xz"
# Also never trained on, and none of it in DEMO_TEXT.
DEMO_CALIBRATION = _DATA / "calibration.jsonl.xz"
DEMO_TASKS = _DATA / "tasks.jsonl"
