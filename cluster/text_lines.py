"""Text files that may be compressed: what ends in .xz or .gz is read through the decompressor."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from typing import TextIO, cast


def open_text(path: Path) -> TextIO:
    """Opens a UTF-8 text file for reading; the caller closes it."""
    if path.suffix == ".xz":
        return cast(TextIO, lzma.open(path, "rt", encoding="utf-8"))
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8")
