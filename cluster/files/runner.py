"""Runs the batches of a folder, one process at a time; whatever kills it, the next one goes on where it was."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace

from ..batch.job import BatchJob, BatchSummary, LineRunner
from ..batch.line import Answer, BatchLine
from .batch_state import BatchFault, BatchOrder, BatchState
from .batch_store import BatchStore
from .durable import try_lock
from .identity import FILE, new_id
from .input_check import check_input
from .results import publish_results

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""How often it looks for new batches, for wishes to cancel and at the clock."""
RETRY_S = 5.0
"""How long a batch rests that met a full disk or another error of the file system."""
JOBS_AT_ONCE = 8
"""Batches whose lines run beside each other; more wait for their turn."""


class BatchRunner:
    """Works through all batches of a store, the oldest first, with at most `room` lines in the engine.

    Batches that run at once take turns line by line. Answers are written as they come.
    """

    def __init__(self, store: BatchStore, lines: LineRunner, room: int, poll_s: float = POLL_S) -> None:
        self._store = store
        self._lines = _SharedRoom(lines, room)
        self._room, self._poll_s = room, poll_s
        self._turn = asyncio.Semaphore(JOBS_AT_ONCE)
        self._checking = asyncio.Semaphore(1)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._ended: set[str] = set()

    async def run(self) -> None:
        """Until it is cancelled; then nothing is lost, and what ran is run again by the next."""
        lock = await self._hold()
        try:
            while True:
                for name in sorted(await asyncio.to_thread(self._store.names)):
                    if name not in self._ended and name not in self._running:
                        self._running[name] = asyncio.create_task(self._look_after(name))
                await asyncio.sleep(self._poll_s)
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            os.close(lock)

    async def _hold(self) -> int:
        """Waits until no other runner has the folder."""
        while (lock := await asyncio.to_thread(try_lock, self._store.runner_lock)) is None:
            await asyncio.sleep(self._poll_s)
        return lock

    async def _look_after(self, name: str) -> None:
        try:
            await self._work_on(name)
            self._ended.add(name)
        except Exception:  # the batch rests, the others go on
            logger.exception("%s cannot go on now; it is tried again in %g s", name, RETRY_S)
            await asyncio.sleep(RETRY_S)
        finally:
            del self._running[name]

    async def _work_on(self, name: str) -> None:
        """From whatever state it is in to its last."""
        state = await asyncio.to_thread(self._store.state, name)
        if state.final:
            return
        order = await asyncio.to_thread(self._store.order, name)
        if state.status == "validating":
            state = await self._validate(order, state)
        if state.status == "in_progress":
            state = await self._answer(order, state)
        if state.status == "finalizing":
            await asyncio.to_thread(self._finish, order, state)

    async def _validate(self, order: BatchOrder, state: BatchState) -> BatchState:
        async with self._checking:
            return await asyncio.to_thread(self._check, order, state)

    def _check(self, order: BatchOrder, state: BatchState) -> BatchState:
        now = self._now()
        try:
            found = check_input(self._store.files.content(order.input_file_id), order.endpoint)
            lines, faults = found.lines, found.faults
        except LookupError:
            lines, faults = 0, (_input_gone(order),)

        def step(asked: int | None) -> BatchState:
            if asked is not None or now >= order.expires_at:
                return state.to("expired" if asked is None else "cancelled", ended_at=now)
            if faults:
                return state.to("failed", faults=faults, ended_at=now)
            return state.to("in_progress", total=lines, in_progress_at=now)

        return self._store.decide(order.id, step)

    async def _answer(self, order: BatchOrder, state: BatchState) -> BatchState:
        """Runs its lines until they are through, or somebody cancels, or its time is over."""
        stop = await asyncio.to_thread(self._stop_reason, order)
        if not stop:
            content = self._store.files.content(order.input_file_id)
            job = BatchJob(self._lines, content, self._store.results(order.id), concurrency=self._room)
            work = asyncio.create_task(self._in_turn(job))
            try:
                while not stop and not (await asyncio.wait({work}, timeout=self._poll_s))[0]:
                    state = await asyncio.to_thread(self._tell, order, state, job.summary)
                    stop = await asyncio.to_thread(self._stop_reason, order)
                if work.done():
                    work.result()  # raises what ended it
                    stop = "completed"
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
        return await asyncio.to_thread(self._begin_finalizing, order, state, stop)

    async def _in_turn(self, job: BatchJob) -> None:
        async with self._turn:
            await job.run()

    def _stop_reason(self, order: BatchOrder) -> str:
        """How the batch ends before all of its lines are through; "": it goes on."""
        if self._store.cancel_asked(order.id) is not None:
            return "cancelled"
        if self._now() >= order.expires_at:
            return "expired"
        try:
            self._store.files.content(order.input_file_id)
        except LookupError:  # not through the server, which refuses that
            return "failed"
        return ""

    def _tell(self, order: BatchOrder, state: BatchState, summary: BatchSummary) -> BatchState:
        """Puts the counts where fronts read them."""
        completed = max(state.completed, summary.kept_succeeded + summary.succeeded)
        failed = max(state.failed, summary.kept_failed + summary.failed)
        if (completed, failed) == (state.completed, state.failed):
            return state
        return self._store.write_state(order.id, replace(state, completed=completed, failed=failed))

    def _begin_finalizing(self, order: BatchOrder, state: BatchState, outcome: str) -> BatchState:
        def step(asked: int | None) -> BatchState:
            return state.to(
                "finalizing",
                outcome=outcome if asked is None else "cancelled",
                faults=(_input_gone(order),) if outcome == "failed" else (),
                finalizing_at=self._now(),
                output_file=new_id(FILE, self._store.clock),
                error_file=new_id(FILE, self._store.clock),
            )

        return self._store.decide(order.id, step)

    def _finish(self, order: BatchOrder, state: BatchState) -> None:
        results = self._store.results(order.id)
        self._store.write_state(order.id, publish_results(self._store.files, order, state, results, self._store.clock))
        results.unlink(missing_ok=True)

    def _now(self) -> int:
        return int(self._store.clock())


class _SharedRoom:
    """A `LineRunner` for several jobs: those that wait for a place get one in the order in which they came."""

    def __init__(self, lines: LineRunner, room: int) -> None:
        self._lines, self._room = lines, asyncio.Semaphore(room)

    async def run(self, line: BatchLine) -> Answer:
        async with self._room:
            return await self._lines.run(line)


def _input_gone(order: BatchOrder) -> BatchFault:
    return BatchFault("input_file_gone", f"{order.input_file_id} is gone")
