"""Jobs that signals stop: main cleans up first, and the handlers are afterwards what they were."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from flyray.cluster.job import run_stoppable
from flyray.cluster.stop_signals import Stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_cancels_and_lets_clean_up(number: signal.Signals) -> None:
    seen: list[str] = []

    async def main() -> None:
        os.kill(os.getpid(), number)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            seen.append("cleaned up")

    before = signal.getsignal(number)
    with pytest.raises(Stopped):
        run_stoppable(main)
    assert seen == ["cleaned up"]
    assert signal.getsignal(number) is before


def test_result_and_errors_pass() -> None:
    async def value() -> int:
        return 7

    async def error() -> None:
        raise KeyError("x")

    async def cancelled() -> None:
        raise asyncio.CancelledError

    assert run_stoppable(value) == 7
    with pytest.raises(KeyError):
        run_stoppable(error)
    with pytest.raises(asyncio.CancelledError):  # nobody asked for an end, so it is no Stopped
        run_stoppable(cancelled)


SECOND_SIGNAL = """
import asyncio, os, signal
from flyray.cluster.job import run_stoppable

async def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

run_stoppable(main, lambda: print("ended", flush=True))
"""


def test_second_signal_ends_at_once() -> None:
    ended = subprocess.run([sys.executable, "-c", SECOND_SIGNAL], stdout=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stdout) == (128 + signal.SIGTERM, b"ended\n")
