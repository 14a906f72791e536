"""`flyray bench kernels` runs every kernel in a model's shapes; its figures follow from times, bytes and ceilings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import TINY
from typer.testing import CliRunner

from flyray.actors.model.config import ModelConfig
from flyray.cluster.bench import kernel_cases
from flyray.cluster.bench.kernel_cases import KernelCases, paged_batch
from flyray.cluster.bench.kernels import Ceilings
from flyray.cluster.bench.machine import this_machine
from flyray.cluster.cli import app
from flyray.cluster.figures import read_figures
from flyray.kernels.cpu.backend import CpuKernels


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: value for key, value in TINY.items() if key != "quantization_config"}))
    return file


def test_the_command_measures_every_kernel_beside_the_ceilings(shape: Path, tmp_path: Path) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    command = ["bench", "kernels", "--model", str(shape.parent), "--tokens", "1,3", "--threads", "1", "--runs", "1"]
    command += ["--variant", "portable", "--json", str(figures), "--plot", str(plot)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = {name: figure.value for name, figure in read_figures(figures).items()}
    for kernel in (
        "experts_w4a8",
        "experts_w8a8",
        "linear_int8.lm_head",
        "linear_int4.lm_head",
        "mla_decode",
        "gate",
        "sample_greedy",
    ):
        at = f"{kernel}.t3.portable"
        assert found[f"kernel_us.{at}"] > 0
        assert found[f"kernel_gb_s.{at}"] <= 1.001 * found[f"kernel_share.{at}"] * found["read_bandwidth"] / 1e9
    assert "mla_prefill.t3" in done.output
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_pattern_without_a_kernel_is_a_usage_error(shape: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", "--model", str(shape), "--only", "softmax*"])
    assert done.exit_code == 2
    assert "no kernel is called softmax*" in done.output


def test_no_weights_are_made_for_what_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "random_matrix", lambda *_: pytest.fail("weights of experts or linears"))
    cases = KernelCases(ModelConfig.from_dict(TINY), 5, only=("mla_*",)).cases([1, 2])
    assert [case.name for case in cases] == ["mla_decode.t1", "mla_decode.t2", "mla_prefill.t2"]


def test_a_variant_that_this_cpu_has_not_is_a_usage_error(shape: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", "--model", str(shape), "--variant", "sse"])
    assert done.exit_code == 2
    assert 'no variant "sse"' in done.output


def test_every_case_runs_and_says_what_it_moves(shape: Path) -> None:
    kernels = CpuKernels(1, "portable")
    cases = list(KernelCases(ModelConfig.from_dict(TINY), context=5).cases([2]))
    for case in cases:
        assert case.bytes > 0
        assert case.operations > 0
        for call in case.calls:
            call(kernels)
    assert len({case.name for case in cases}) == len(cases)
    kernels.close()


def test_a_floor_is_the_slower_of_reading_and_computing(shape: Path) -> None:
    (case, *_) = KernelCases(ModelConfig.from_dict(TINY), context=5).cases([2])
    ceilings = Ceilings(read=case.bytes / 2, int8=case.operations / 3, bf16=1.0)
    assert ceilings.floor(case) == pytest.approx(3)
    assert Ceilings(read=case.bytes / 4, int8=case.operations / 3, bf16=1.0).floor(case) == pytest.approx(4)


def test_a_batch_gives_each_sequence_pages_of_its_own() -> None:
    batch, pages = paged_batch([1, 2], [17, 2])
    assert pages == 3
    assert batch.page_table.tolist() == [[0, 1], [2, -1]]
    assert batch.positions.tolist() == [16, 0, 1]
    assert batch.slots.tolist() == [16, 32, 33]
    assert batch.query_start.dtype is torch.int32


def test_the_machine_is_told_by_its_name_and_the_instructions_that_matter(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name : A Processor 9000\nflags : fpu avx2 amx_int8 sse\n")
    machine = this_machine(file)
    assert (machine.cpu, machine.instructions) == ("A Processor 9000", ("avx2", "amx_int8"))
    assert machine.cores >= 1
