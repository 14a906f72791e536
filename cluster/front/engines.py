"""Where a front's requests find an engine that takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..engine_client import EngineClient


class Engines(Protocol):
    """One engine or many, which come and go."""

    async def engine_for(self, prompt: Sequence[int], lost: EngineClient | None = None) -> EngineClient:
        """The client of an engine that takes requests; waits for one.

        lost: the one that has just lost this request; it is given again only once it has been heard to take requests
        anew. Raises EngineUnavailable with the reason where no engine will come, or none has come in time
        (`serve.recovery_timeout_s`).
        """
        ...
