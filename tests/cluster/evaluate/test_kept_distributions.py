"""The folder of kept distributions: there for the while only, and only where it fits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flyray.cluster.evaluate.distributions import SpaceError, distributions_folder, needed_bytes


def test_needed_bytes_are_of_every_scored_token() -> None:
    assert needed_bytes([range(10), range(1)], 4096) == 9 * 4096 * 4


def test_folder_is_gone_afterwards_also_after_an_error(tmp_path: Path) -> None:
    with distributions_folder(tmp_path / "work", 1000) as folder:
        (folder / "0").mkdir()
        (folder / "0" / "0.f32").write_bytes(b"1234")
        assert folder.is_absolute()
        assert folder.parent == tmp_path / "work"
    assert list((tmp_path / "work").iterdir()) == []
    with pytest.raises(KeyError), distributions_folder(tmp_path / "work", 0) as folder:
        raise KeyError
    assert not folder.exists()


def test_too_little_room_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with (
        pytest.raises(SpaceError, match=r"needs 1000000\.00 GB there.*, \d+\.\d\d GB are free; .*--text-bytes"),
        distributions_folder(tmp_path, 10**15),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


HOLDS = """
import sys
from pathlib import Path
from flyray.cluster.evaluate.distributions import distributions_folder
with distributions_folder(Path(sys.argv[1]), 0) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_run_left_is_removed_and_a_running_ones_is_not(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    held = Path(other.stdout.readline().strip())
    with distributions_folder(tmp_path, 0):
        assert held.is_dir()
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert held.is_dir()
    with distributions_folder(tmp_path, 0) as folder:
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
