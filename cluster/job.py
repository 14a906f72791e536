"""A job with a beginning and an end (a batch, an evaluation) as an asyncio program that signals can stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .local_ray import LocalRay
from .ray_address import connect
from .stop_signals import Stopped, StopSignals

T = TypeVar("T")
Main = Callable[[], Coroutine[Any, Any, T]]


def nothing() -> None:
    """There is nothing to end."""


@contextmanager
def job_ray(cpus: int, address: str = "local", keep_logs: bool = False) -> Iterator[Callable[[], None]]:
    """Ray for a job: a local cluster of `cpus` CPUs that ends with the context, or the one at `address`.

    In it SIGINT and SIGTERM raise Stopped, and a second one ends at once. Yields what ends all processes at once.
    """
    if address != "local":
        import ray

        with StopSignals(nothing) as signals:
            connect(address)
            signals.arm()
            try:
                yield nothing
            finally:
                signals.closing()
                ray.shutdown()
        return
    local = LocalRay(cpus, keep_logs=keep_logs)
    with StopSignals(local.end_now) as signals:
        try:
            local.start()
            signals.arm()
            yield local.end_now
        finally:
            signals.closing()
            local.stop()


def run_stoppable(main: Main[T], end_now: Callable[[], None] = nothing) -> T:
    """asyncio.run, where SIGINT and SIGTERM cancel main() and raise Stopped once it has cleaned up.

    A second signal calls end_now and leaves the process. The signals' handlers are afterwards what they were before.
    """
    asked = False

    async def guarded() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def stop(number: int) -> None:
            nonlocal asked
            if asked:
                end_now()
                os._exit(128 + number)
            asked = True
            if task is not None:
                task.cancel()

        for number in before:
            loop.add_signal_handler(number, stop, number)
        return await main()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if asked:
            raise Stopped from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_on_ray(main: Main[T], *, cpus: int, address: str = "local", keep_logs: bool = False) -> T:
    """Runs main() in the Ray of `job_ray`. Raises Stopped when a signal came; main was cancelled and has cleaned up."""
    with job_ray(cpus, address, keep_logs) as end_now:
        return run_stoppable(main, end_now)
