"""Which engines there are: Serve's own list of replicas, each asked for its state.

A handle knows the running replicas through its long poll of Serve's controller, so there is no directory to keep: one
that Serve drains or replaces is off the list before it hears of it, and one that died when its call fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from .engine_state import EngineState

_ASK_TIMEOUT_S = 4.0


class EngineRoster(Protocol):
    """The engines that may get requests, and how to have one where there are none."""

    async def states(self) -> Sequence[EngineState]:
        """Of each that answers. Raises any exception where it cannot be known now."""
        ...

    async def wake(self) -> None:
        """Returns when there is an engine, which may be starting; with none to be had never."""
        ...


class ServeRoster:
    """`EngineRoster` of a Serve deployment of `EngineReplica`s."""

    def __init__(self, engines: DeploymentHandle) -> None:
        self._engines = engines

    async def states(self) -> list[EngineState]:
        """See `EngineRoster`. Raises TimeoutError while one of them hangs, until Serve takes it off its list."""
        with contextlib.suppress(DeploymentUnavailableError):  # there is none
            told = self._engines.broadcast("state")
            found = await told.results_async(timeout_s=_ASK_TIMEOUT_S, return_exceptions=True)
            return [state for state in found if isinstance(state, EngineState)]
        return []

    async def wake(self) -> None:
        """See `EngineRoster`. A call that waits for a replica is what has Serve start the first one."""
        await self._engines.state.remote()
