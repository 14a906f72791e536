"""The base of what goes wrong with an engine."""

from __future__ import annotations


class EngineError(Exception):
    """An engine that cannot start or go on; the message says why."""
