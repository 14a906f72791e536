"""Calls of an engine's shard actors through Ray: to all at once, with an end, and with the names of those that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
import ray.exceptions

from .engine_error import EngineError

_PERIOD_S = 0.2


class ShardsFailed(EngineError):
    """shards: those that are dead, silent, or raised something."""

    def __init__(self, message: str, shards: Iterable[int]) -> None:
        super().__init__(message)
        self.shards = frozenset(shards)


class ShardCalls:
    """handles: of `ShardActor`, in shard order; one may be replaced by that of a new actor between two calls."""

    def __init__(self, handles: Sequence[Any], patience_s: float) -> None:
        """patience_s: told in errors as how long an answer was waited for."""
        self.handles = list(handles)
        self._patience_s = patience_s
        self._stopping = threading.Event()

    def stop(self) -> None:
        """`ask` gives up soon; from any thread."""
        self._stopping.set()

    def ask(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        deadline: float,
        on_wait: Callable[[float], None] | None = None,
    ) -> list[Any]:
        """Calls a method of every shard and waits for all, or for the first that fails. Raises ShardsFailed.

        on_wait: called now and then with the seconds that are left.
        """
        calls = [getattr(shard, method).remote(*each) for shard, each in zip(self.handles, arguments, strict=True)]
        waiting = list(calls)
        while waiting:
            left = deadline - time.monotonic()
            if self._stopping.is_set():
                raise EngineError("the engine was stopped")
            if left <= 0:
                raise self._silent(method, [calls.index(call) for call in waiting])
            done, waiting = ray.wait(waiting, timeout=min(left, _PERIOD_S))
            for call in done:
                self._check(call, calls.index(call))
            if on_wait is not None:
                on_wait(left)
        return ray.get(calls)

    def ask_all(self, method: str, *arguments: Any) -> None:
        """Calls a method of every shard and waits for all, also if one fails. Raises ShardsFailed."""
        calls = [getattr(shard, method).remote(*arguments) for shard in self.handles]
        _, silent = ray.wait(calls, num_returns=len(calls), timeout=self._patience_s)
        if silent:
            raise self._silent(method, [calls.index(call) for call in silent])
        for shard, call in enumerate(calls):
            self._check(call, shard, f"in {method}")

    def failing(self, method: str, shards: Sequence[int], timeout_s: float) -> dict[int, str]:
        """Calls a method of these shards; returns what is wrong with each that does not do it in time."""
        calls = {getattr(self.handles[shard], method).remote(): shard for shard in shards}
        done, silent, end = [], list(calls), time.monotonic() + timeout_s
        while silent and time.monotonic() < end and not self._stopping.is_set():
            done, silent = ray.wait(list(calls), num_returns=len(calls), timeout=_PERIOD_S)
        found = {calls[call]: f"no answer to {method} within {timeout_s:g} s" for call in silent}
        for call in done:
            try:
                self._check(call, calls[call], f"in {method}")
            except ShardsFailed as error:
                found[calls[call]] = str(error)
        return found

    def _silent(self, method: str, shards: Sequence[int]) -> ShardsFailed:
        names = ", ".join(f"shard {shard}" for shard in shards)
        return ShardsFailed(f"{names}: no answer to {method} within {self._patience_s:g} s", shards)

    def _check(self, call: ray.ObjectRef, shard: int, when: str = "while it started") -> None:
        try:
            ray.get(call)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise ShardsFailed(f"shard {shard}: {type(cause).__name__}: {cause}", [shard]) from cause
        except ray.exceptions.RayActorError as error:
            raise ShardsFailed(f"shard {shard} died {when}: {error}", [shard]) from error
