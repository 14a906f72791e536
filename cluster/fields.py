"""Turning pydantic's findings about a request or a configuration into one clear line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from .names import nearest


def path_of(location: Sequence[int | str]) -> str:
    """("messages", 0, "content") as "messages[0].content"."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def first_error(error: ValidationError, model: type[BaseModel], noun: str = "field") -> tuple[str, str]:
    """(path of the field, what is wrong with it) of the first finding; unknown fields come first."""
    found = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")[0]
    location = found["loc"]
    path = path_of(location)
    if found["type"] == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        known = list(owner.model_fields) if owner else []
        return path, f"unknown {noun} '{path}'{nearest(str(location[-1]), known)}"
    if found["type"] == "missing":
        return path, f"'{path}' is missing"
    text = found["msg"].removeprefix("Value error, ")  # pydantic's own word before what a validator of ours says
    message = text[:1].lower() + text[1:]
    if not path:
        return path, message
    return path, f"'{path}': {message}, found {_shorten(found.get('input'))}"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel] | None:
    """The model that the object at `location` is checked against, through lists and optional fields."""
    current: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if current else None
        current = _model_in(field.annotation) if field else None
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _model_in(inner):
            return found
    return None
