"""A run that is stopped, however hard, goes on with the same command and ends with the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from quantized import quantize_by, recipe_of
from server_process import PATIENCE_S
from source_checkpoints import NATIVE_QUANTIZATION, native_tensors, write_checkpoint
from tiny_engine import process_is_gone

from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.quantize.command import QuantizeInputs, quantize, quantize_all
from flyray.cluster.quantize.manifest import MANIFEST, Manifest, check_sums
from flyray.cluster.quantize.matrix import QuantizeError
from flyray.cluster.quantize.quantize_run import QuantizeRun
from flyray.cluster.quantize.target_folder import LocalFolder, is_part

FILES = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of a few tensors each."""
    tensors = list(native_tensors().items())
    files = {f"model-{index}.safetensors": dict(tensors[index::FILES]) for index in range(FILES)}
    return write_checkpoint(tmp_path_factory.mktemp("resume") / "source", files, NATIVE_QUANTIZATION)


@pytest.fixture(scope="module")
def expected(local_ray: None, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of what a run gives that nothing stops."""
    target = tmp_path_factory.mktemp("whole") / "made"
    quantize_by("w4a8", source, target)
    return digests(target)


def digests(folder: Path) -> dict[str, str]:
    """Of every file but quantize.json, which holds times."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """pytest's own folders have names too long for the sockets that Ray puts below."""
    with tempfile.TemporaryDirectory(prefix="q") as folder:
        yield Path(folder)


DRIVER = """
import sys
from flyray.cluster.quantize import command, quantize_run

class Announced(command.QuantizeRun):
    def take(self, progress):
        super().take(progress)
        if progress.record is not None:
            print("recorded", flush=True)
            sys.stdin.readline()

command.QuantizeRun = Announced
sys.exit(command.run(sys.argv[1], sys.argv[2], "w4a8", command.QuantizeInputs(), workers=1))
"""


def start_driver(source: Path, target: Path, folder: Path) -> subprocess.Popen[str]:
    """In a Ray and a session of its own; waits for a line after every record."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(source), str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        start_new_session=True,
    )


def wait_for_records(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdout is not None
    assert process.stdin is not None
    for number in range(count):
        if number:
            process.stdin.write("go on\n")
            process.stdin.flush()
        assert process.stdout.readline() == "recorded\n"


def members_of(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == session and not process_is_gone(pid):
                found.append(pid)
    return found


def kill(pid: int) -> None:
    """With signal 9; returns when it has ended."""
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert select.select([handle], [], [], PATIENCE_S)[0]
    finally:
        os.close(handle)


def kill_session(process: subprocess.Popen[str]) -> None:
    """The driver and all of its Ray, as when a machine loses power."""
    while members := members_of(process.pid):  # again, for one may have begun another meanwhile
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                kill(member)
    process.wait()


def test_kill_9_of_everything_after_a_record(
    expected: dict[str, str], source: Path, tmp_path: Path, short_folder: Path
) -> None:
    target = tmp_path / "out"
    for records, finished in ((1, 1), (3, 4)):
        process = start_driver(source, target, short_folder)
        wait_for_records(process, records)
        with pytest.raises(QuantizeError, match="another flyray quantize is writing there"):
            quantize_by("w4a8", source, target)
        kill_session(process)
        assert len(Manifest.read(target).files) == finished
        assert not (target / "config.json").exists()
    report = quantize_by("w4a8", source, target)
    assert report.kept_files == 4
    assert digests(target) == expected
    assert check_sums(target) == []


KILLED_WORK = """
import os, signal, sys
from pathlib import Path
import torch
from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.quantize import file_task
from flyray.cluster.quantize.memory import MemoryBudget
from flyray.cluster.quantize.plan import plan_quantization
from flyray.cluster.quantize.plan_inputs import QuantizeInputs
from flyray.cluster.quantize.recipe import load_recipe

class Killed(file_task.SafetensorsWriter):
    left = 0
    def write_bytes(self, name, data):
        super().write_bytes(name, data)
        Killed.left -= 1
        if not Killed.left:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
file_task.SafetensorsWriter = Killed
plan = plan_quantization(Checkpoint(sys.argv[1]), Path(sys.argv[2]), "w4a8", load_recipe("w4a8"), QuantizeInputs())
for moment in map(int, sys.argv[3:]):
    child = os.fork()
    if child == 0:
        Killed.left = moment
        list(file_task.quantize_files(plan.files, file_task.WorkSettings(MemoryBudget(1 << 30))))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_kill_9_of_the_work_in_the_middle_of_files(expected: dict[str, str], source: Path, tmp_path: Path) -> None:
    """Killed at these writes; each leaves a hidden part, and none a file that is not whole under its name."""
    target = tmp_path / "out"
    target.mkdir()
    moments = (1, 2, 7, 20, 33, 41)
    command = [sys.executable, "-c", KILLED_WORK, str(source), str(target), *map(str, moments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert ended.stdout.split() == [str(-signal.SIGKILL)] * len(moments)
    parts = [path.name for path in target.iterdir() if is_part(path.name)]
    assert len(parts) == len(moments)
    for path in target.glob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == expected[path.name]
    for part in parts:  # what is left of a folder that was made and nothing recorded
        assert LocalFolder(target).names().count(part) == 0
    for path in target.glob("*.safetensors"):
        path.unlink()
    quantize_by("w4a8", source, target)
    assert digests(target) == expected


@pytest.fixture
def worker(local_ray: None) -> int:
    """The process that runs the next task: the only one that a Ray of one CPU has."""
    return ray.get(ray.remote(num_cpus=1)(lambda: os.getpid()).remote())


def test_a_worker_that_is_killed_is_replaced(
    expected: dict[str, str], source: Path, worker: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, died = QuantizeRun.take, []

    def kill_after_first(run: QuantizeRun, progress: Any) -> None:
        take(run, progress)
        if progress.record is not None and not died:
            died.append(worker)
            kill(worker)

    monkeypatch.setattr(QuantizeRun, "take", kill_after_first)
    quantize_by("w4a8", source, tmp_path / "out")
    assert died == [worker]
    assert digests(tmp_path / "out") == expected


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(local_ray: None, worker: int, tmp_path: Path) -> None:
    """A limit on file size refuses writes as a full disk does, with an OSError from the kernel. 1 MB is more than the
    first file has, and less than the second."""
    tensors = native_tensors()
    large = {"language_model.model.norm.weight": torch.ones(1 << 20, dtype=torch.bfloat16)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in large}
    source = write_checkpoint(tmp_path / "source", {"a.safetensors": rest, "b.safetensors": large}, NATIVE_QUANTIZATION)
    before = resource.prlimit(worker, resource.RLIMIT_FSIZE)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(QuantizeError, match=r"b\.safetensors: File too large"):
            quantize_by("w4a8", source, tmp_path / "out")
    finally:
        resource.prlimit(worker, resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.safetensors", MANIFEST]
    assert quantize_by("w4a8", source, tmp_path / "out").kept_files == 1
    quantize_by("w4a8", source, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_only_the_same_making_goes_on(local_ray: None, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize_by("w4a8", source, target)
    written = (target / "config.json").stat().st_mtime_ns
    again = quantize_by("w4a8", source, target)
    assert (again.kept_files, again.bytes_read) == (FILES, 0)
    assert again.weight_error > 0
    assert (target / "config.json").stat().st_mtime_ns == written
    rule = {"modules": ["*.experts.*"], "format": "w8a8"}
    with pytest.raises(QuantizeError, match="out: was made from another recipe; --overwrite begins anew"):
        quantize(source, target, recipe_of(rule), progress=False)
    assert Checkpoint(target).expert_format() == "w4a8"
    assert quantize(source, target, recipe_of(rule), overwrite=True, progress=False).kept_files == 0
    assert Checkpoint(target).expert_format() == "w8a8"
    assert check_sums(target) == []


def test_a_finished_file_that_was_lost_is_made_again(local_ray: None, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize_by("w4a8", source, target)
    whole = digests(target)
    (target / "model-1.safetensors").unlink()
    (target / "model-2.safetensors").write_bytes(b"short")
    assert quantize_by("w4a8", source, target).kept_files == FILES - 2
    assert digests(target) == whole


def test_room_is_not_asked_for_what_is_there_or_goes(
    local_ray: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    quantize_by("w4a8", source, target)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    # So much is free that the whole fits only where the old files' room counts.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size // 2))
    with pytest.raises(QuantizeError, match=r"other: .* are needed, .* are free"):
        quantize_by("w4a8", source, tmp_path / "other")
    (target / "model-1.safetensors").unlink()
    (target / ".model-1.safetensors.0.part").write_bytes(bytes(size))
    assert quantize_by("w4a8", source, target).kept_files == FILES - 1
    rule = {"modules": ["*.experts.*"], "format": "w4a8", "clip": "none"}
    linear = {"modules": ["*.o_proj"], "format": "w8a8"}
    assert quantize(source, target, recipe_of(rule, linear), overwrite=True, progress=False).kept_files == 0


def test_a_failure_before_a_folder_is_touched_leaves_what_is_in_it(
    local_ray: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    quantize_by("w4a8", source, old)
    before = digests(old), (old / MANIFEST).read_bytes()

    def refuse(run: QuantizeRun) -> None:
        raise OSError("no more")

    monkeypatch.setattr(QuantizeRun, "begin", refuse)
    rule = recipe_of({"modules": ["*.experts.*"], "format": "w8a8"})
    targets = {name: (rule, QuantizeInputs(), tmp_path / name) for name in ("new", "old")}
    with pytest.raises(OSError, match="no more"):
        quantize_all(source, targets, overwrite=True, progress=False)
    assert not (tmp_path / "new").exists()
    assert (digests(old), (old / MANIFEST).read_bytes()) == before


def test_a_damaged_manifest_is_refused(local_ray: None, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize_by("w4a8", source, target)
    (target / MANIFEST).write_bytes((target / MANIFEST).read_bytes()[:-5])
    with pytest.raises(QuantizeError, match=r"quantize\.json: is damaged"):
        quantize_by("w4a8", source, target)
    quantize_by("w4a8", source, target, overwrite=True)
    assert check_sums(target) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_all_of_its_processes(
    expected: dict[str, str], source: Path, tmp_path: Path, short_folder: Path, number: signal.Signals
) -> None:
    target = tmp_path / "out"
    process = start_driver(source, target, short_folder)
    wait_for_records(process, 2)
    process.send_signal(number)
    said, _ = process.communicate("\n" * FILES, timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "stopped; the same command goes on with what is finished in" in said
    assert [path.name for path in short_folder.iterdir()] == []
    assert members_of(process.pid) == []
    assert len(Manifest.read(target).files) == 2
    assert quantize_by("w4a8", source, target).kept_files == 2
    assert digests(target) == expected
