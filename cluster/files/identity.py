"""Ids of files and batches: they sort as they came to be, and are safe as names of folders."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

FILE = "file-"
BATCH = "batch_"
_DIGITS = re.compile(r"[0-9a-f]{24}")


def new_id(prefix: str, clock: Callable[[], float] = time.time) -> str:
    """The prefix, the microseconds since 1970 in 13 hexadecimal digits, which last until 2112, and 11 random ones."""
    return f"{prefix}{int(clock() * 1e6):013x}{secrets.token_hex(6)[:11]}"


def is_id(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and _DIGITS.fullmatch(name[len(prefix) :]) is not None


def created_at(name: str, prefix: str) -> int:
    """The Unix time, in seconds, at which an id was made."""
    return int(name[len(prefix) :][:13], 16) // 1_000_000


@dataclass(frozen=True)
class Page:
    """What part of a list is asked for: at most `limit` ids behind `after`, a known id or "", newest first or last."""

    limit: int
    after: str = ""
    newest_first: bool = True

    def candidates(self, names: Iterable[str]) -> list[str]:
        """All ids behind `after`, in order; `after` itself may be gone."""
        ordered = sorted(names, reverse=self.newest_first)
        if not self.after:
            return ordered
        return [name for name in ordered if (name < self.after if self.newest_first else name > self.after)]
