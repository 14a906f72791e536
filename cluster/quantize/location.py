"""Folders by path or by fsspec URL: how the command's words become something to read from and to write to."""

from __future__ import annotations

import os
from pathlib import Path

from upath import UPath

from ...actors.storage import StorageError, stored_path
from .matrix import QuantizeError

Location = Path | UPath
"""A folder here, or one on another file system of fsspec's."""


def locate(place: str | os.PathLike[str] | UPath) -> Location:
    """A plain path, or a "file://" URL, as a Path; any other URL as a UPath. Raises QuantizeError for a URL whose file
    system is unknown or not installed."""
    try:
        return stored_path(place)
    except StorageError as error:
        raise QuantizeError(f"{place}: {error}") from error


def same_place(one: Location, other: Location) -> bool:
    if isinstance(one, Path) != isinstance(other, Path):
        return False
    return str(one.resolve()) == str(other.resolve())
