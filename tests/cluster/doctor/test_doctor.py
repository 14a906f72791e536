"""What the doctor finds, in packages, in the environment, in memory and in kernels."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flyray.actors.model.config import ModelConfig
from flyray.cluster.build.built import Built, NotBuilt
from flyray.cluster.cli import app
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.doctor.devices import check_copy, check_masks, copy_rate, published
from flyray.cluster.doctor.kernels import check_backend
from flyray.cluster.doctor.packages import check_packages, installed_packages
from flyray.cluster.doctor.request import examination
from flyray.cluster.doctor.target import check_target, judge_built
from flyray.cluster.figures import read_figures
from flyray.cluster.synthesize import Synthesis, model_file
from flyray.kernels.flydsl.isa import Isa

LOCAL = Path(__file__).parents[3] / "deploy" / "local.yaml"
WANTED = ["ray[serve]>=2.50", "torch>=2.9,<2.14", 'flydsl==0.4.2; extra == "rocm"', 'flyray[gpu]; extra == "test"']


def test_packages_are_held_against_what_is_asked_for() -> None:
    found = list(check_packages(WANTED, {"ray": "2.40.0", "flydsl": "0.3.0", "aiter": "0.13"}))
    assert [(each.about, each.state) for each in found] == [
        ("ray", "fault"), ("torch", "fault"), ("flydsl", "warning"), ("aiter", "fault"),
    ]  # fmt: skip
    assert found[0].text == "is 2.40.0, needed is >=2.50: pip install 'ray[serve]>=2.50'"
    assert found[1].text == "is not installed; install it with: pip install 'torch<2.14,>=2.9'"
    assert "pip uninstall aiter" in found[3].text
    fitting = list(check_packages(WANTED, {"ray": "2.60.0", "torch": "2.13.0+cpu"}))
    assert [(each.state, each.text) for each in fitting] == [("ok", "ray 2.60.0, torch 2.13.0+cpu")]


def test_what_is_installed_here_satisfies_flyray() -> None:
    found = list(check_packages(metadata.requires("flyray") or (), installed_packages()))
    assert {each.about: each.text for each in found if each.state == "fault"} == {}
    assert f"torch {torch.__version__}" in next(each.text for each in found if each.about == "packages")


@pytest.mark.parametrize(
    ("environment", "hip", "found"),
    [
        ({}, False, []),
        ({"CUDA_VISIBLE_DEVICES": "1"}, False, [("ok", "CUDA_VISIBLE_DEVICES=1")]),
        ({}, True, []),
        ({"HIP_VISIBLE_DEVICES": "0"}, True, [("warning", "on ROCm Ray wants both alike")]),
        ({"HIP_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "1"}, True, [("warning", "they add up")]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "0"}, True, [("ok", "")]),
    ],
)
def test_variables_that_hide_gpus(environment: dict[str, str], hip: bool, found: list[tuple[str, str]]) -> None:
    findings = list(check_masks(environment, hip))
    assert [each.state for each in findings] == [state for state, _ in found]
    for each, (_, text) in zip(findings, found, strict=True):
        assert text in each.text


def test_memory_is_measured_against_what_is_published() -> None:
    device = torch.device("cpu")
    assert copy_rate(device, 1 << 20) > 0
    assert check_copy(device, None, 1 << 20).state == "ok"
    slow = check_copy(device, 1e18, 1 << 20)
    assert slow.state == "warning"
    assert "of the published" in slow.text
    assert [figure.name for figure in slow.figures] == ["copy_bytes_s.cpu"]


def test_gpus_are_known_by_their_drivers_names() -> None:
    names = ["AMD Instinct MI325X", "NVIDIA H200", "NVIDIA H100 80GB HBM3", "AMD Instinct MI210"]
    assert [gpu.name if (gpu := published(name)) else "" for name in names] == ["MI325X", "H200", "H100", ""]


def test_kernels_are_checked_and_a_backend_without_its_gpu_is_a_fault() -> None:
    model = ModelConfig.from_dict(Synthesis(model_file(str(DEMO_MODEL))).config())
    assert check_backend("cpu", 1, model).state == "ok"
    if not torch.cuda.is_available():
        missing = check_backend("torch", 1, model)
        assert (missing.state, missing.about) == ("fault", "kernels of torch")
        assert "sees none in this process" in missing.text


def test_the_command_reports_and_measures(tmp_path: Path) -> None:
    out = tmp_path / "doctor.json"
    done = CliRunner().invoke(app, ["doctor", str(LOCAL), "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "0 faults" in done.output
    found = read_figures(out)
    assert found["read_bytes_s.cpu"].value > 0
    assert found["read_bytes_s.disk"].value > 0
    assert found["planned_bytes.cpu"].value > 2 * 256 << 20
    said = {each["about"]: each["state"] for each in json.loads(out.read_text())["findings"]}
    assert said["kernels of cpu"] == said["memory against the plan"] == "ok"
    if not torch.cuda.is_available():
        assert found["all_to_all_bytes_s"].value > 0
        assert said["gloo, 2 processes"] == "ok"


def test_a_configuration_and_a_model_are_one_too_many() -> None:
    done = CliRunner().invoke(app, ["doctor", str(LOCAL), "--model", "kimi-k2.5"])
    assert (done.exit_code, done.output.strip()) == (2, "flyray: give either a configuration or --model")


def test_a_model_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    (folder / "model-00002-of-000003.safetensors").unlink()
    file = tmp_path / "flyray.yaml"
    file.write_text("model: {path: model}\nengine: {backend: rocm}\n")
    asked = examination(file, "", "gfx942")
    assert (asked.demand, asked.folder, asked.backend, asked.target) == (None, None, "rocm", "gfx942")
    (trouble,) = asked.trouble
    assert (trouble.about, trouble.state) == ("model", "fault")
    assert "model-00002-of-000003.safetensors" in trouble.text


def test_what_does_not_compile_for_a_target_is_a_fault() -> None:
    isa = Isa(vgpr=96, sgpr=40, spills=0, parked=0, scratch=0, lds=1024, lines=(), loop=Counter())
    right = Built("triton.a", "triton", "a", isa, 2048, 4, "", "")
    spilled = replace(right, name="triton.b", isa=replace(isa, spills=3))
    broken = NotBuilt("triton.c", "triton", ("does not compile: no",))
    assert judge_built("gfx942", "triton", [right]).state == "ok"
    found = judge_built("gfx942", "triton", [right, spilled, broken])
    assert (found.state, found.about) == ("fault", "gfx942 triton")
    assert "1 of 3 kernels compiled without spills, with at most 96 VGPR and 2048 bytes of LDS" in found.text
    assert {figure.name: figure.value for figure in found.figures}["kernels_at_fault.triton"] == 2


def test_a_format_that_there_is_not_is_a_fault() -> None:
    model = ModelConfig.from_dict(Synthesis("bench-1b").config())
    (found,) = check_target("gfx942", model, ("int3",))
    assert found.state == "fault"
    assert "int3" in found.text
