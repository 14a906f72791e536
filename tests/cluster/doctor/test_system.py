"""Limits, versions, memory against the plan, and what a process under Ray sees."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flyray.cluster.config import demo_config, load_config
from flyray.cluster.doctor.devices import SeenGpu
from flyray.cluster.doctor.disk import check_disk
from flyray.cluster.doctor.fit import Demand, available_memory, check_fit
from flyray.cluster.doctor.ray_gpus import RayView, check_ray, judge_view, look
from flyray.cluster.doctor.system import (
    check_amd_files,
    check_balancing,
    check_files,
    check_huge_pages,
    check_locked,
    check_shared_memory,
)
from flyray.cluster.doctor.versions import check_aiter, check_rocm, check_triton
from flyray.cluster.weight_bytes import weight_bytes

GIB = 1 << 30
NOSET = {"RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES": "1"}


def test_limits_say_what_raises_them() -> None:
    assert check_files(1024).state == "warning"
    assert "--ulimit nofile=65536" in check_files(1024).text
    assert check_files(65536).state == check_files(resource.RLIM_INFINITY).state == "ok"
    assert check_locked(8 << 20).state == "warning"
    assert "0.01 GiB" in check_locked(8 << 20).text
    assert check_locked(resource.RLIM_INFINITY).state == "ok"


def test_shared_memory_is_that_of_the_folder(tmp_path: Path) -> None:
    found = check_shared_memory(0, tmp_path)
    assert found.figures[0].value > 0
    assert check_shared_memory(0, tmp_path / "no").state == "unknown"


@pytest.mark.parametrize(
    ("setting", "nodes", "state"), [("0", 2, "ok"), ("1", 1, "ok"), ("1", 2, "warning"), ("2", 2, "warning")]
)
def test_pages_that_move_between_nodes_are_a_warning(tmp_path: Path, setting: str, nodes: int, state: str) -> None:
    (tmp_path / "numa_balancing").write_text(f"{setting}\n")
    for node in range(nodes):
        (tmp_path / f"node{node}").mkdir()
    found = check_balancing(1, tmp_path / "numa_balancing", tmp_path)
    assert found.state == state
    assert check_balancing(1, tmp_path / "none", tmp_path).state == ("ok" if nodes == 1 else "unknown")


def test_huge_pages(tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    assert check_huge_pages(setting).state == "unknown"
    for text, state in (("always [madvise] never", "ok"), ("always madvise [never]", "warning")):
        setting.write_text(text)
        assert check_huge_pages(setting).state == state


def test_the_drivers_files_must_be_there_and_open(tmp_path: Path) -> None:
    assert [each.state for each in check_amd_files(tmp_path)] == ["fault", "fault"]
    (tmp_path / "dev/dri").mkdir(parents=True)
    (tmp_path / "dev/kfd").touch()
    found = list(check_amd_files(tmp_path))
    assert [each.state for each in found] == ["ok", "fault"]
    assert "groups render and video" in found[1].text
    (tmp_path / "dev/dri/renderD128").touch()
    assert [each.state for each in check_amd_files(tmp_path)] == ["ok", "ok"]


def test_rocms_versions_are_held_against_each_other(tmp_path: Path) -> None:
    assert list(check_rocm(None, tmp_path)) == []
    assert next(check_rocm("7.2.26015-fc0010cf6a", tmp_path)).state == "ok"
    assert next(check_rocm("6.2.41133-dd7f95766", tmp_path)).state == "warning"
    info = tmp_path / "opt/rocm-6.4.1/.info"
    info.mkdir(parents=True)
    (info / "version").write_text("6.4.1-83\n")
    assert next(check_rocm("6.4.43483-a187df25c", tmp_path)).state == "ok"
    found = next(check_rocm("7.2.26015-fc0010cf6a", tmp_path))
    assert found.state == "warning"
    assert "/opt/rocm has 6.4.1-83" in found.text


@pytest.mark.parametrize(
    ("requires", "installed", "found"),
    [
        (['triton==3.6.0; platform_system == "Linux"'], {"triton": "3.6.0"}, [("ok", "as torch asks for")]),
        (["triton==3.6.0"], {"triton": "3.9.0"}, [("warning", "is 3.9.0; torch asks for triton==3.6.0")]),
        (["triton-rocm==3.6.0"], {}, [("fault", "pip install 'triton-rocm==3.6.0'")]),
        (["filelock", 'triton>=3; extra == "all"'], {}, []),
    ],
)
def test_tritons_version_is_the_one_that_torch_asks_for(
    requires: list[str], installed: dict[str, str], found: list[tuple[str, str]]
) -> None:
    findings = list(check_triton(requires, installed))
    assert [each.state for each in findings] == [state for state, _ in found]
    for each, (_, text) in zip(findings, found, strict=True):
        assert text in each.text


def test_another_package_of_aiters_name_is_told_from_amds(tmp_path: Path) -> None:
    assert list(check_aiter(False)) == []
    (other,) = check_aiter(True, tmp_path)
    assert (other.about, other.state) == ("amd-aiter", "warning")
    assert "asynchronous iterators" in other.text
    (tmp_path / "mla.py").touch()
    (old,) = check_aiter(True, tmp_path)
    assert "do not fit its release" in old.text


def test_the_disk_is_read(tmp_path: Path) -> None:
    assert check_disk(tmp_path).state == "unknown"
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    found = check_disk(tmp_path)
    assert found.state == "ok"
    assert found.figures[0].value > 0


def test_the_demo_fits_its_cpu_and_not_a_smaller_one() -> None:
    demand = Demand.of_config(demo_config())
    states = []
    for available in (GIB, int(0.18 * 1e9), int(0.1 * 1e9)):
        (found,) = check_fit(demand, (), available)
        states.append(found.state)
        assert found.figures[0].value == pytest.approx(2 * (64 << 20) + 0.04e9, rel=0.1)
    assert states == ["ok", "warning", "fault"]
    assert available_memory() > 0


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert available_memory(tmp_path) == 8000 << 10
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 8000 << 10
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("1000000\n")
    assert available_memory(tmp_path) == 2000000


@pytest.mark.parametrize(
    ("gpus", "free", "states", "said"),
    [
        (3, 250, ["ok"] * 3, "198.19 GB of weights"),
        (3, 200, ["fault"] * 3, "are taken"),
        (2, 250, ["fault"] * 2, "no room for a cache; 3 shards are the least"),
    ],
)
def test_kimi_is_held_against_each_gpus_memory(gpus: int, free: int, states: list[str], said: str) -> None:
    seen = [SeenGpu(number, "AMD Instinct MI325X", free * 10**9, 256 * GIB) for number in range(gpus)]
    found = list(check_fit(Demand.of_model("kimi-k2.5", gpus), seen, GIB))
    assert [each.state for each in found] == states
    assert said in found[0].text


def test_shards_without_a_gpu_here_are_a_warning() -> None:
    demand = replace(Demand.of_model("kimi-k2.5", 3), shards=4)
    seen = [SeenGpu(0, "AMD Instinct MI325X", 256 * GIB, 256 * GIB)]
    found = list(check_fit(demand, seen, GIB))
    assert [each.state for each in found] == ["warning", "ok"]
    assert "4 shards need a GPU each, 1 are seen here" in found[0].text


def test_a_configurations_demand_is_the_engines() -> None:
    demand = Demand.of_config(load_config(Path(__file__).parents[3] / "deploy" / "local.yaml"))
    assert (demand.shards, demand.accelerated, demand.kv_memory) == (2, False, 256 << 20)
    assert (demand.work.format, demand.work.kv_dtype) == ("w4a8", "f32")


def test_slices_of_attention_and_redundant_experts_count() -> None:
    """Two shards of the demo model: 3 experts more on each in 7 layers; half of the heads and of the logits less."""
    demand = Demand.of_config(demo_config())
    expert = weight_bytes(demand.work.model, "w4a8", (), (), tiled=False).expert

    def planned(**changes: Any) -> float:
        (found,) = check_fit(replace(demand, **changes), (), GIB)
        return found.figures[0].value

    assert planned(redundant_experts=3) - planned() == 2 * 3 * 7 * expert
    assert planned(attention="tensor_parallel") < planned()
    kimi = replace(Demand.of_model("kimi-k2.5", 8), redundant_experts=4)
    seen = [SeenGpu(0, "AMD Instinct MI325X", 256 * GIB, 256 * GIB)]
    more, tensor = (
        list(check_fit(each, seen, GIB))[1].text for each in (kimi, replace(kimi, attention="tensor_parallel"))
    )
    assert "94.43 GB of weights" in more
    assert float(tensor.split(": ")[1].split()[0]) < 94.43


VIEW = RayView(("1",), 8, NOSET, 1, "AMD Instinct MI325X")


@pytest.mark.parametrize(
    ("view", "known", "hip", "state", "said"),
    [
        (VIEW, 8, True, "ok", "its own is 1, AMD Instinct MI325X"),
        (None, 0, True, "fault", "Ray none"),
        (replace(VIEW, visible=1, environment={"HIP_VISIBLE_DEVICES": "1"}), 8, True, "fault", "RCCL cannot reach"),
        (replace(VIEW, visible=1, environment={"CUDA_VISIBLE_DEVICES": "1"}), 8, False, "ok", "its own"),
        (replace(VIEW, visible=0, environment={"ROCR_VISIBLE_DEVICES": "1"}), 8, True, "fault", "unset what hides"),
        (replace(VIEW, error="Ray assigned GPU 9, but"), 8, True, "fault", "Ray assigned GPU 9"),
        (VIEW, 4, True, "warning", "the others stay idle"),
    ],
)
def test_what_a_process_under_ray_sees_is_judged(
    view: RayView | None, known: int, hip: bool, state: str, said: str
) -> None:
    found = judge_view(view, known, 8, hip)
    assert found.state == state
    assert said in found.text


def test_a_process_under_ray_says_what_it_sees(local_ray: None) -> None:
    """None here has a GPU: the way there and back is what runs."""
    view = look(gpus=0)
    assert (view.assigned, view.error) == ((), "Ray assigned none")


def test_a_cluster_that_is_not_there_is_a_fault() -> None:
    (found,) = check_ray("127.0.0.1:1", 8, True)
    assert found.state == "fault"
    assert "nothing answers at 127.0.0.1:1" in found.text
