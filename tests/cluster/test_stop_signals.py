"""Signals that ask to end, while Ray is waited for."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import ray

from flyray.cluster.stop_signals import Stopped, StopSignals


@pytest.mark.parametrize("wait", [ray.get, lambda answer: ray.wait([answer])], ids=["get", "wait"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_wait_for_ray_ends_at_once(local_ray: None, wait, number: signal.Signals) -> None:
    answer = ray.remote(resources={"what no node has": 1})(_nothing).remote()
    asking = threading.Timer(0.2, os.kill, (os.getpid(), number))
    try:
        with StopSignals(lambda: None), pytest.raises(KeyboardInterrupt):
            _begin_and(asking, wait, answer)
    finally:
        asking.join()
        ray.cancel(answer)


def test_a_signal_that_interrupts_no_call_is_heard() -> None:
    """As one that comes just before the call begins: here another thread gets it."""
    asking = threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
    try:
        with StopSignals(lambda: None) as signals, pytest.raises(Stopped):
            _begin_and(asking, lambda _: signals.wait(), None)
    finally:
        asking.join()


def _begin_and(asking: threading.Timer, wait: Callable[[Any], Any], answer: Any) -> None:
    """Both where the exception is expected: the signal may come before the wait has begun."""
    asking.start()
    wait(answer)


def _nothing() -> None: ...
