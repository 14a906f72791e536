"""Text to calibrate a byte model with."""

from __future__ import annotations

import json
from pathlib import Path

TEXTS = [f"{number} plus {number * number} is something. " * 9 for number in range(20)]


def write_text(path: Path) -> Path:
    """A file of `TEXTS`, of three sources."""
    path.write_text("\n".join(json.dumps({"text": text, "source": str(n % 3)}) for n, text in enumerate(TEXTS)))
    return path
