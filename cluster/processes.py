"""This process's descendants: keeping them in reach and ending them. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02
_KILL_TIMEOUT_S = 30.0


def adopt_orphans() -> None:
    """From now on a descendant whose parent dies becomes this process's child, so that none gets out of reach."""
    if sys.platform != "linux":
        raise OSError(f"flyray starts Ray clusters on Linux only, not on {sys.platform}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def descendants() -> set[int]:
    """Ids of all processes below this one, also of those that ended and still wait for their parent to notice."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The command's name stands in parentheses and may hold any character; the state and parent follow it.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    front = [os.getpid()]
    while front:
        below = [child for parent in front for child in children.get(parent, [])]
        found.update(below)
        front = below
    return found


def end_descendants(spare: Iterable[int] = (), grace_s: float = 2.0) -> int:
    """Ends all descendants but `spare`: SIGTERM, and SIGKILL after `grace_s` seconds. Returns how many there were.

    Gives up on what is still there half a minute after SIGKILL: only the kernel can hold a process that long.
    """
    spared = set(spare)
    ended: set[int] = set()
    number, until = signal.SIGTERM, time.monotonic() + grace_s
    while targets := descendants() - spared:
        if time.monotonic() > until:
            if number == signal.SIGKILL:
                break
            number, until = signal.SIGKILL, time.monotonic() + _KILL_TIMEOUT_S
        new = targets if number == signal.SIGKILL else targets - ended
        ended |= targets
        _signal(new, number)
        time.sleep(_POLL_S)
        _reap(targets)
    return len(ended)


def _signal(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _reap(processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ChildProcessError):
            os.waitpid(process, os.WNOHANG)
