"""Brings an engine's shards together again when one is lost, while its router goes on taking requests."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from .engine_error import EngineError
from .engine_shape import EngineShape
from .formation import ExpertMoves, Formation
from .shard import LEAVE_TIMEOUT_S
from .shard_calls import ShardCalls, ShardsFailed
from .shard_group import ShardGroup, ShardLost

WINDOW_S = 300.0
"""For so long the loss of a shard counts (`EngineConfig.shard_restarts`)."""
_DYING_S = 0.5
# Beside the time that a step may take to end there.
_CALL_S = 5.0

logger = logging.getLogger(__name__)


class Restarts:
    """How often shards were lost lately: `allowed` times each within `WINDOW_S`."""

    def __init__(self, allowed: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed, self._clock = allowed, clock
        self._lost: dict[int, deque[float]] = defaultdict(deque)

    def count(self, shards: Iterable[int]) -> None:
        """Takes up that these are lost. Raises EngineError for one that has been lost too often."""
        now = self._clock()
        for shard in shards:
            times = self._lost[shard]
            times.append(now)
            while times[0] <= now - WINDOW_S:
                times.popleft()
            if len(times) > self._allowed:
                raise EngineError(
                    f"shard {shard} was lost {len(times)} times within {WINDOW_S:g} s; shard_restarts allows "
                    f"{self._allowed}"
                )


class Recovering(Protocol):
    """The router, as far as it concerns recovery."""

    def pause(self) -> ExpertMoves:
        """Leaves experts where they are, and says where that is."""
        ...

    def resume(self, shards: ShardGroup, epoch: int) -> None:
        """Has these shards run what was running."""
        ...

    def fail(self, reason: str) -> None:
        """Ends all requests and takes no more."""
        ...


class Recovery:
    """Of one engine. epoch: of the shards that run, or come together.

    Shards that live drop the epoch and keep what they have loaded; those that are gone, that hang, or that failed by
    themselves are killed and started anew by `renew`. Where another one is lost meanwhile, it begins again.
    """

    def __init__(
        self,
        calls: ShardCalls,
        formation: Formation,
        renew: Callable[[int], Any],
        restarts: Restarts,
        timeout_s: float,
    ) -> None:
        """renew: kills a shard's process, if it lives, and returns a new actor's handle. timeout_s: of each try."""
        self.epoch = 0
        self._calls, self._formation, self._renew = calls, formation, renew
        self._restarts, self._timeout_s = restarts, timeout_s
        self._thread: threading.Thread | None = None
        self._stopping = False

    def begin(self, lost: ShardLost, router: Recovering, shape: EngineShape) -> None:
        """Returns at once; `router` is told the end."""
        if self._thread is not None:
            self._thread.join()  # it has told the end and has nothing left to do
        self._thread = threading.Thread(target=self._run, args=(lost, router, shape), name="recovery", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when nothing is asked of the shards any more."""
        self._stopping = True
        self._calls.stop()
        if self._thread is not None:
            self._thread.join()

    def _run(self, lost: ShardLost, router: Recovering, shape: EngineShape) -> None:
        begin = time.monotonic()
        try:
            moves = router.pause()
            suspects, reason = lost.shards, str(lost)
            while True:
                self._gather(suspects, reason)
                self.epoch += 1
                try:
                    group = self._form(shape, moves)
                    break
                except ShardsFailed as error:
                    suspects, reason = error.shards, str(error)
                except ShardLost as error:
                    suspects, reason = error.shards, str(error)
            logger.warning("shards came back in %.1f s as epoch %d: %s", time.monotonic() - begin, self.epoch, lost)
            router.resume(group, self.epoch)
        except Exception as error:
            if not isinstance(error, EngineError):
                logger.exception("recovery")
            router.fail(f"{lost}; it did not come back: {error}")

    def _form(self, shape: EngineShape, moves: ExpertMoves) -> ShardGroup:
        deadline = time.monotonic() + self._timeout_s
        self._formation.find(deadline)
        return self._formation.form(shape, self.epoch, moves, deadline)

    def _gather(self, suspects: Iterable[int], reason: str) -> None:
        """Has those that live leave the epoch, and starts the others anew. Raises EngineError if one was too often."""
        suspected, shards = frozenset(suspects), range(len(self._calls.handles))
        gone = [shard for shard in shards if self._is_gone(shard, _DYING_S if shard in suspected else 0.0)]
        others = [shard for shard in shards if shard not in gone]
        # What is started takes longest, so it begins first.
        self._start_anew(gone, reason)
        failing = self._calls.failing("leave", others, LEAVE_TIMEOUT_S + _CALL_S)
        for shard, error in failing.items():
            logger.warning("shard %d is started anew: %s", shard, error.partition("\n")[0])
        self._start_anew(failing, reason)
        if not gone and not failing:
            self._restarts.count([-1])

    def _start_anew(self, shards: Iterable[int], reason: str) -> None:
        if self._stopping:
            raise EngineError("the engine was stopped")
        try:
            self._restarts.count(shards)
        except EngineError as error:
            raise EngineError(f"{error}, the last time because: {reason}") from None
        for shard in shards:
            self._calls.handles[shard] = self._renew(shard)

    def _is_gone(self, shard: int, patience_s: float) -> bool:
        """Whether the shard's process, of this node, has ended; one whose connection closed may be about to."""
        pid = self._formation.local_pid(shard)
        if pid is None:
            return False
        end = time.monotonic() + patience_s
        while not _ended(pid):
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True


def _ended(pid: int) -> bool:
    """One that waits to be reaped has, too."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:  # it ended between the two, or this system has no /proc
        return False
