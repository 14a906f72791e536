"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..figures import Figure

State = Literal["ok", "unknown", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """about: what was looked at. text: what is so, and for a warning or a fault what to do. A fault keeps flyray from
    running as it should; what is unknown could not be looked at. figures: what was measured."""

    about: str
    state: State
    text: str
    figures: tuple[Figure, ...] = ()
