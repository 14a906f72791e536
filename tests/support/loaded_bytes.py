"""The bytes of loaded weights."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from torch import Tensor


def held(value: object) -> int:
    """Bytes of all floats and codes in dataclasses; not of the numbers by which experts are found."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, tuple):
        return sum(map(held, value))
    if not is_dataclass(value) or isinstance(value, type):
        return 0
    return sum(held(getattr(value, field.name)) for field in fields(value) if field.name not in ("block", "place"))
