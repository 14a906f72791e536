"""Folders for the while: gone with their user, or removed by the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flyray.cluster.scratch_folder import scratch_folder

ENDS_AT_ONCE = """
import os, sys
from pathlib import Path
from flyray.cluster.scratch_folder import scratch_folder
held = scratch_folder(Path(sys.argv[1]), "some-")
folder = held.__enter__()
(folder / "data").write_bytes(b"left")
print(folder, flush=True)
os._exit(9)
"""


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS_AT_ONCE, tmp_path], check=False, stdout=subprocess.PIPE)
    left = Path(ended.stdout.decode().strip())
    assert (left / "data").exists()
    with scratch_folder(tmp_path, "other-"):
        assert left.exists()
    with scratch_folder(tmp_path, "some-") as first:
        assert not left.exists()
        (first / "data").write_bytes(b"used")
        with scratch_folder(tmp_path, "some-") as second:
            assert first != second
            assert (first / "data").exists()
        assert not second.exists()
    with pytest.raises(KeyError), scratch_folder(tmp_path / "below", "some-") as third:
        raise KeyError(third)
    assert os.listdir(tmp_path) == ["below"]
    assert os.listdir(tmp_path / "below") == []
