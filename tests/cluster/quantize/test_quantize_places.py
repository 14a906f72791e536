"""Sources and targets by URL, and nodes that share them."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from quantized import quantize_by
from ray.cluster_utils import Cluster
from source_checkpoints import NATIVE_QUANTIZATION, native_checkpoint, native_tensors, write_checkpoint
from upath import UPath

from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.quantize import task_pool
from flyray.cluster.quantize.command import QuantizeInputs, quantize
from flyray.cluster.quantize.file_task import WorkSettings, quantize_files
from flyray.cluster.quantize.manifest import MANIFEST, Manifest, check_sums
from flyray.cluster.quantize.matrix import QuantizeError
from flyray.cluster.quantize.memory import MemoryBudget
from flyray.cluster.quantize.plan import plan_quantization
from flyray.cluster.quantize.recipe import load_recipe
from flyray.cluster.quantize.target_folder import target_folder

RECIPE = load_recipe("w4a8")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """Each with a CPU. Ray's sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="q") as folder:
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": str(Path(folder, "ray"))}
        small = {"object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**head, **small})
        cluster.add_node(num_cpus=1, **small)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        cluster.wait_for_nodes()
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = list(native_tensors().items())
    files = {f"model-{index}.safetensors": dict(tensors[index::4]) for index in range(4)}
    return write_checkpoint(tmp_path_factory.mktemp("places") / "source", files, NATIVE_QUANTIZATION)


@pytest.fixture(scope="module")
def expected(two_nodes: Cluster, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("expected") / "made"
    quantize_by("w4a8", source, target)
    return target


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_tasks_are_spread_over_the_nodes(
    expected: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_pool, "_BATCH_BYTES", 1)  # a task a file, as large files have
    report = quantize_by("w4a8", source, tmp_path / "out")
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert len(alive) == 2
    assert set(report.nodes) == alive
    assert {record.node for record in Manifest.read(tmp_path / "out").files.values()} == alive
    assert digests(tmp_path / "out") == digests(expected)


def test_the_command_runs_on_a_cluster(two_nodes: Cluster, expected: Path, source: Path, tmp_path: Path) -> None:
    arguments = [str(source), str(tmp_path / "out"), "--format", "w4a8", "--ray", two_nodes.address]
    program = "from flyray.cluster.cli import main; main()"
    subprocess.run([sys.executable, "-c", program, "quantize", *arguments], check=True, capture_output=True)
    assert digests(tmp_path / "out") == digests(expected)
    known = {node["NodeID"] for node in ray.nodes()}
    assert {record.node for record in Manifest.read(tmp_path / "out").files.values()} <= known


def test_file_urls_are_folders(expected: Path, source: Path, tmp_path: Path) -> None:
    report = quantize(source.as_uri(), (tmp_path / "out").as_uri(), RECIPE, progress=False)
    assert report.target == tmp_path / "out"
    assert digests(tmp_path / "out") == digests(expected)


def test_another_file_system_takes_and_gives_the_same_bytes(expected: Path, source: Path, tmp_path: Path) -> None:
    """fsspec's own caching file system: neither reads nor writes go through the local paths' code."""
    target = tmp_path / "out"
    url = f"simplecache::file://{target}"
    quantize(f"simplecache::file://{source}", url, RECIPE, progress=False)
    assert digests(target) == digests(expected)
    assert check_sums(url) == []
    assert Manifest.read(url).files.keys() == Manifest.read(expected).files.keys()


@pytest.fixture
def memory_folder() -> Iterator[UPath]:
    folder = UPath(f"memory://flyray-{os.getpid()}")
    yield folder
    folder.rmdir(recursive=True)


def test_a_remote_folder_is_uploaded_to_and_read_from(expected: Path, source: Path, memory_folder: UPath) -> None:
    """In one process, for that file system lives in a process."""
    for file in source.iterdir():
        (memory_folder / "source" / file.name).write_bytes(file.read_bytes())
    target = memory_folder / "out"
    target_folder(target).create()
    plan = plan_quantization(Checkpoint(memory_folder / "source"), target, "label", RECIPE, QuantizeInputs())
    records = [message.record for message in quantize_files(plan.files, WorkSettings(MemoryBudget(1 << 30)))]
    for file, record in zip(plan.files, filter(None, records), strict=True):
        content = (target / file.name).read_bytes()
        assert content == (expected / file.name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == record.sha256
    assert target_folder(target).names() == [file.name for file in plan.files]


def test_urls_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="nosuch://bucket/model: no file system for this URL"):
        quantize("nosuch://bucket/model", tmp_path / "out", RECIPE)
    native_checkpoint(tmp_path / "source")
    with pytest.raises(QuantizeError, match="same folder"):
        quantize(tmp_path / "source", (tmp_path / "source").as_uri(), RECIPE)
