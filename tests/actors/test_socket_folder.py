"""A folder for Unix sockets, and how it goes."""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flyray.actors.link import LinkError
from flyray.actors.socket_folder import SocketFolder

OWNER = """
import sys
from flyray.actors.socket_folder import SocketFolder
folder = SocketFolder()
open(folder.path + "/plan", "x").close()
print(folder.path, folder._remover.pid, flush=True)
sys.stdin.read()
"""


def test_only_this_user_may_enter_and_closing_removes_it() -> None:
    folder = SocketFolder()
    assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700
    Path(folder.path, "plan").touch()
    folder.close()
    assert not os.path.exists(folder.path)
    folder.close()  # the second time there is nothing to do


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_it_goes_when_its_process_is_killed(sent: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        path, remover = owner.stdout.readline().split()
        assert os.path.exists(path)
        watched = os.pidfd_open(int(remover))
        owner.send_signal(sent)
    assert select.select([watched], [], [], 60)[0], "the folder's remover outlives its process"
    os.close(watched)
    assert not os.path.exists(path)


def test_a_path_too_long_for_sockets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(LinkError, match=r"too long for Unix sockets, at most 87 bytes; set TMPDIR"):
        SocketFolder()
    assert os.listdir(long) == []
