"""`Decodes` from rows, for tests that write plans by hand."""

from __future__ import annotations

from flyray.actors.step_plan import Decodes


def decodes(*rows: tuple[int, int] | tuple[int, int, tuple[int, ...]]) -> Decodes:
    """Of rows of (sequence, start) or (sequence, start, its new pages)."""
    pages = [(place, page) for place, row in enumerate(rows) for page in (row[2] if len(row) == 3 else ())]
    return Decodes(
        tuple(row[0] for row in rows),
        tuple(row[1] for row in rows),
        tuple(place for place, _ in pages),
        tuple(page for _, page in pages),
    )
