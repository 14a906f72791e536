"""What cannot be quantized is refused before anything is written; what fails halfway leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from source_checkpoints import (
    NATIVE_QUANTIZATION,
    PREFIX,
    bf16_checkpoint,
    native_checkpoint,
    native_tensors,
    write_checkpoint,
)

from flyray.actors.checkpoint import Checkpoint, CheckpointError
from flyray.cluster.quantize.command import quantize, quantize_all
from flyray.cluster.quantize.file_task import quantize_files
from flyray.cluster.quantize.matrix import QuantizeError, TensorSpec
from flyray.cluster.quantize.plan import check_space, plan_quantization
from flyray.cluster.quantize.quark_quantizer import ExtensionLock, require_quark
from flyray.cluster.quantize.safetensors_writer import SafetensorsWriter, temporary_path

EXPERT = "model.layers.1.mlp.experts.2.down_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return native_checkpoint(tmp_path / "source")


@pytest.fixture(scope="module")
def folded(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in `w4a8`, which needs no Quark."""
    folder = tmp_path_factory.mktemp("folded")
    quantize(native_checkpoint(folder / "source"), folder / "w4a8", "w4a8", progress=False)
    return folder / "w4a8"


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_unknown_formats_are_told_the_known_ones(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="unknown format 'int4'; known are w4a8, w8a8, w8a8-fp8, w4a8-channel"):
        quantize(source, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_targets_that_would_lose_something_are_refused(source: Path, tmp_path: Path) -> None:
    before = files_below(source)
    with pytest.raises(QuantizeError, match="source and target are the same folder"):
        quantize(source, source.parent / "." / "source", "w4a8", overwrite=True)
    assert files_below(source) == before
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(QuantizeError, match=r"full: is not empty; pass --overwrite"):
        quantize(source, full, "w4a8")
    assert files_below(full) == ["notes.txt"]
    with pytest.raises(QuantizeError, match="is a file, not a folder"):
        quantize(source, full / "notes.txt", "w4a8", overwrite=True)
    with pytest.raises(QuantizeError, match="two formats cannot share a folder"):
        quantize_all(source, {"w4a8": tmp_path / "x", "w8a8": tmp_path / "y" / ".." / "x"})
    with pytest.raises(QuantizeError, match="workers is 0"):
        quantize(source, tmp_path / "x", "w4a8", workers=0)
    with pytest.raises(QuantizeError, match=r"GB are needed, .* GB are free"):
        check_space(tmp_path / "deep" / "er", 1 << 60)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("sizes", "format", "message"),
    [
        # The published layout refuses these when it is read ...
        ({"intermediate": 40}, "w8a8", r"experts\.0\.down_proj has 40 columns; w4a16 needs a multiple of 32"),
        ({"intermediate": 36}, "w8a8", r"experts\.0\.down_proj has 40 columns; w4a16 needs a multiple of 32"),
        # ... and this one fits its groups, but not two multipliers a byte.
        ({"intermediate": 96}, "w4a8", r"experts\.0\.down_proj has 96 columns, not a multiple of 64"),
    ],
)
def test_dimensions_that_do_not_fit_are_named(tmp_path: Path, sizes: dict[str, int], format: str, message: str) -> None:
    source = native_checkpoint(tmp_path / "source", **sizes)
    with pytest.raises((QuantizeError, CheckpointError), match=message):
        quantize(source, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_bf16_dimensions_that_do_not_fit_are_named(tmp_path: Path) -> None:
    name = f"{PREFIX}model.layers.1.mlp.experts.0.gate_proj.weight"
    weight = {name: torch.zeros(8, 36, dtype=torch.bfloat16)}
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": weight}, None)
    for format, multiple in (("w4a8", 64), ("w4a8-channel", 8)):
        with pytest.raises(QuantizeError, match=rf"gate_proj has 36 columns, not a multiple of {multiple}"):
            quantize(source, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_a_padded_matrix_is_named(tmp_path: Path) -> None:
    tensors = native_tensors()
    tensors[f"{PREFIX}{EXPERT}.weight_shape"] = torch.tensor([128, 60], dtype=torch.int32)
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": tensors}, NATIVE_QUANTIZATION)
    with pytest.raises(QuantizeError, match=rf"{EXPERT}\.weight_shape says \[128, 60\].* holds \[128, 64\]"):
        quantize(source, tmp_path / "out", "w4a8")


def test_a_quantized_source_is_refused(folded: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="already quantized to w4a8; quantize the native"):
        quantize(folded, tmp_path / "out", "w8a8")


def test_missing_quark_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_quark()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    with pytest.raises(QuantizeError, match=r"amd-quark is not installed: pip install 'flyray\[quantize\]'"):
        require_quark()


def test_a_build_that_was_killed_does_not_block_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits for ever on the file that a killed build leaves; two builds at once must still not meet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    stale = tmp_path / "quark_hw_emulation" / "lock"
    stale.parent.mkdir()
    stale.touch()
    with ExtensionLock(tmp_path):
        assert not stale.exists()
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)
        with (tmp_path / "flyray.lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "flyray.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def damaged(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = native_tensors()
    change(tensors)
    shutil.rmtree(source)
    first = {name: tensor for name, tensor in tensors.items() if ".experts.2." not in name}
    second = {name: tensor for name, tensor in tensors.items() if name not in first}
    return write_checkpoint(source, {"a.safetensors": first, "b.safetensors": second}, NATIVE_QUANTIZATION)


@pytest.mark.parametrize(
    ("format", "value", "message"),
    [
        ("w4a8", -1.0, rf"{EXPERT}: group scale of row 5, group 1 is -1\.0"),
        ("w8a8", float("nan"), rf"{EXPERT}\.weight_scale holds values that are not finite"),
    ],
)
def test_a_bad_weight_met_halfway_leaves_no_target(
    local_ray: None, source: Path, tmp_path: Path, format: str, value: float, message: str
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}{EXPERT}.weight_scale"][5, 1] = value

    damaged(source, change)
    with pytest.raises(QuantizeError, match=message):
        quantize(source, tmp_path / "out", format, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_failure_with_overwrite_spares_other_files(local_ray: None, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize(source, target, "w4a8", progress=False)
    (target / "notes.txt").write_text("mine")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}{EXPERT}.weight_scale"][0, 0] = -1

    damaged(source, change)
    with pytest.raises(QuantizeError, match=EXPERT):
        quantize(source, target, "w4a8", overwrite=True, progress=False)
    assert files_below(target) == ["notes.txt"]


def test_a_task_cut_short_leaves_no_file(tmp_path: Path) -> None:
    """Dropped after the copied tensors and the first of many chunks, as when the task is cancelled."""
    plan = plan_quantization(Checkpoint(bf16_checkpoint(tmp_path / "source")), tmp_path / "out", "w4a8")
    plan.target.mkdir()
    work = quantize_files(plan.files, chunk_weights=1)
    next(work)
    assert next(work).errors
    assert temporary_path(plan.files[0].target).exists()
    work.close()
    assert files_below(plan.target) == []


def test_chunks_do_not_change_the_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint(native_checkpoint(tmp_path / "source"))
    content = []
    for name, chunk_weights in (("small", 1), ("large", 1 << 30)):
        plan = plan_quantization(checkpoint, tmp_path / name, "w4a8")
        plan.target.mkdir()
        messages = list(quantize_files(plan.files, chunk_weights))
        assert sum(message.source_bytes for message in messages) == plan.source_bytes
        assert [message.target for message in messages if message.complete] == [file.target for file in plan.files]
        content.append([file.target.read_bytes() for file in plan.files])
    assert content[0] == content[1]


def test_a_killed_process_leaves_no_file_under_its_name_and_can_be_repeated(tmp_path: Path) -> None:
    source = native_checkpoint(tmp_path / "source")
    plan = plan_quantization(Checkpoint(source), tmp_path / "out", "w4a8")
    plan.target.mkdir()
    code = (
        "import os, sys; from pathlib import Path\n"
        "from flyray.actors.checkpoint import Checkpoint\n"
        "from flyray.cluster.quantize.file_task import quantize_files\n"
        "from flyray.cluster.quantize.plan import plan_quantization\n"
        "plan = plan_quantization(Checkpoint(sys.argv[1]), Path(sys.argv[2]), 'w4a8')\n"
        "work = quantize_files(plan.files, chunk_weights=1); next(work); next(work); os._exit(9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(source), str(plan.target)], check=False, timeout=120)
    assert ended.returncode == 9
    first = plan.files[0].target
    assert files_below(plan.target) == [temporary_path(first).name]
    list(quantize_files(plan.files))
    assert files_below(plan.target) == sorted(file.target.name for file in plan.files)


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """A limit on file size refuses writes as a full disk does, with an OSError from the kernel."""
    target = tmp_path / "model.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(OSError, match="File too large"),
            SafetensorsWriter(target, {"a": TensorSpec(torch.float32, (4096,))}) as writer,
        ):
            writer.write("a", torch.ones(4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert files_below(tmp_path) == []


def test_a_file_lacking_a_tensor_is_not_committed(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.int8, (3,))}
    with SafetensorsWriter(tmp_path / "model.safetensors", specs) as writer:
        writer.write("a", torch.ones(2))
        with pytest.raises(QuantizeError, match="tensor b was not written"):
            writer.commit()
    with (
        pytest.raises(QuantizeError, match=r"tensor a came out as torch\.int8 \[2\], expected torch\.float32 \[2\]"),
        SafetensorsWriter(tmp_path / "model.safetensors", specs) as writer,
    ):
        writer.write("a", torch.ones(2, dtype=torch.int8))
    assert files_below(tmp_path) == []


INTERRUPTED = """
import sys
from pathlib import Path
from flyray.cluster.local_ray import LocalRay
from flyray.cluster.quantize import command

class Announced(LocalRay):
    def __enter__(self):
        super().__enter__()
        from flyray.cluster.quantize import task_pool
        start = task_pool._start
        def announce(files):
            stream = start(files)
            print("started", flush=True)
            return stream
        task_pool._start = announce
        return self

command.LocalRay = Announced
command.quantize(sys.argv[1], Path(sys.argv[2]), "w8a8", workers=1, progress=False)
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """pytest's own folders have names too long for the sockets that Ray puts below."""
    with tempfile.TemporaryDirectory(prefix="q") as folder:
        yield Path(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_leaves_nothing(
    source: Path, tmp_path: Path, short_folder: Path, number: signal.Signals
) -> None:
    """In a Ray of its own, stopped while its task imports Quark."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(source), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(short_folder)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (tmp_path / "out").exists()
    assert files_below(short_folder) == []
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and session_of(pid) == process.pid]
    assert left == []


def session_of(pid: str) -> int | None:
    try:
        return int(Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return None


def test_index_and_config_come_last(folded: Path) -> None:
    """Without them the folder does not open: an interrupted run is never taken for a whole checkpoint."""
    newest = max(folded.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "config.json"
    weight_map = json.loads((folded / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {path.name for path in folded.glob("*.safetensors")}
