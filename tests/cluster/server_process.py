"""A real `flyray` process for tests, and what it must not leave behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

FLYRAY = Path(sys.executable).parent / "flyray"
# Nothing takes so long unless it hangs, on a slow machine beside other tests too.
PATIENCE_S = 200.0
_LOG_LINES = 20


class ServerProcess:
    """Runs `flyray ARGUMENTS` with a temporary folder of its own, whose content and descendants can be looked at."""

    def __init__(self, *arguments: str) -> None:
        # Ray's sockets lie deep in this folder and their paths are limited to 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [FLYRAY, *arguments],
            # A Ray of its own has a token of its own.
            env={name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
            | {"TMPDIR": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, timeout_s: float = PATIENCE_S) -> str:
        """The first line that has `text`. Fails when the process ends without it, with all that is known of it."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or any(text in line for line in self.lines), timeout_s)
        found = [line for line in self.lines if text in line]
        assert found, f"no line with {text!r} in:\n{self.output}\n{self.state()}"
        return found[0]

    def state(self) -> str:
        """Its exit code, its processes, and how each of Ray's logs ends while it runs."""
        said = [f"exit code {self.process.poll()}", *(f"{pid}: {line}" for pid, line in self.descendants().items())]
        for log in sorted(self.folder.glob("**/logs/**/*")):
            if log.is_file() and (lines := _read(log).splitlines()):
                said += [f"--- {log.relative_to(self.folder)}", *lines[-_LOG_LINES:]]
        return "\n".join(said)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Waits for the process to end by itself and returns its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def descendants(self) -> dict[int, str]:
        """Process id to command line of everything below the process."""
        return {pid: command_line(pid) for pid in below(self.process.pid)}

    def shared_memory(self) -> set[str]:
        """Files in /dev/shm that the process and its descendants have mapped."""
        files: set[str] = set()
        for pid in [self.process.pid, *below(self.process.pid)]:
            maps = _read(Path(f"/proc/{pid}/maps")).splitlines()
            files |= {line.split()[5] for line in maps if " /dev/shm/" in line}
        return files

    def close(self) -> None:
        """Kills what is left, for a test that failed."""
        left = [self.process.pid, *below(self.process.pid)] if self.process.poll() is None else []
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def assert_nothing_left(server: ServerProcess, processes: dict[int, str], memory: set[str]) -> None:
    """processes and memory: what `descendants` and `shared_memory` gave while it ran; some may have ended by then."""
    left = {pid: command for pid, command in processes.items() if command and command_line(pid) == command}
    assert left == {}
    assert [name for name in memory if Path(name).exists()] == []
    assert list(server.folder.iterdir()) == []


def below(root: int) -> list[int]:
    """Ids of a process's descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _read(entry / "stat")):
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = list(children.get(root, []))
    for pid in found:
        found += children.get(pid, [])
    return found


def command_line(pid: int) -> str:
    """Empty for a process that is gone."""
    return _read(Path(f"/proc/{pid}/cmdline"))


def until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Asks again and again; for states of another process that sends no event."""
    over = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < over, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
