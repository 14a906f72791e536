"""What all parts of a request are made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """Takes no unknown fields and changes no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def fail(message: str) -> PydanticCustomError:
    return PydanticCustomError("flyray", "{reason}", {"reason": message})
