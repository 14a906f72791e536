"""Folders by path or by fsspec URL: how the command's words become something to read from and to write to."""

from __future__ import annotations

import os
from pathlib import Path

from upath import UPath

Location = Path | UPath
"""A local folder, or one on another file system of fsspec's."""

_LOCAL = ("file", "local")


def locate(place: str | os.PathLike[str] | UPath) -> Location:
    """A plain path, or a "file://" URL, as a Path; any other URL as a UPath."""
    if isinstance(place, UPath):
        return Path(place.path) if place.protocol in ("", *_LOCAL) else place
    text = os.fspath(place)
    if "://" not in text:
        return Path(text)
    url = UPath(text)
    return Path(url.path) if url.protocol in _LOCAL else url


def is_local(place: Location) -> bool:
    return isinstance(place, Path)
