"""What the FlyDSL source says that it runs, and what it refuses by name."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from flyray.kernels.flydsl import source
from flyray.kernels.flydsl.source import FlyDslSource
from flyray.kernels.protocol import Bf16Matrix, ExpertWeights, GateConfig, Int4Matrix, Int8Matrix, Kernels
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.source import KernelShapes, KernelSource

REFERENCE: Kernels = ReferenceKernels()
KIMI = KernelShapes(
    7168, 64, 1536, 512, 128, 64, 128, 2048, 384, 128, GateConfig(8, 1, 1, True, 2.827), (Int4Matrix,), (),
    torch.bfloat16, 64,
)  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "find_spec", lambda name: importlib.util.find_spec("torch"))


@pytest.mark.usefixtures("installed")
def test_kimis_experts_are_run() -> None:
    flydsl: KernelSource = FlyDslSource(REFERENCE, "gfx942")
    for operation in flydsl.operations:
        for kind in (Int4Matrix, Int8Matrix):
            assert flydsl.refusal(operation, kind, KIMI) == ""
        assert flydsl.promise(operation).reservation == ""


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("operation", "kind", "target", "change", "says"),
    [
        ("gate", None, "gfx942", {}, "has no gate"),
        ("experts", Bf16Matrix, "gfx942", {}, "not Bf16Matrix"),
        ("experts", Int4Matrix, "gfx950", {}, "is written for gfx942, not gfx950"),
        ("experts", Int4Matrix, "gfx942", {"hidden_size": 7152}, "hidden_size is 7152, not a multiple of 32"),
        ("prepare", Int8Matrix, "gfx942", {"moe_intermediate_size": 2040}, "moe_intermediate_size is 2040, not a mult"),
    ],
)
def test_what_does_not_fit_is_refused(
    operation: str, kind: type | None, target: str, change: dict[str, int], says: str
) -> None:
    shapes = dataclasses.replace(KIMI, **change)
    assert says in FlyDslSource(REFERENCE, target).refusal(operation, kind, shapes)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    assert "the package flydsl is not installed" in FlyDslSource(REFERENCE, "gfx942").refusal(
        "experts", Int4Matrix, KIMI
    )


def test_other_layouts_are_refused() -> None:
    flydsl = FlyDslSource(REFERENCE, "gfx942")
    none = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="weights is str, another backend's layout"):
        flydsl.experts(None, none, none, "weights")  # pyright: ignore[reportArgumentType]


def test_sizes_can_be_had_without_a_gpu() -> None:
    def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def int4(rows: int, inner: int) -> Int4Matrix:
        groups = meta(torch.uint8, 10, rows, inner // 32)
        return Int4Matrix(meta(torch.uint8, 10, rows, inner // 2), groups, meta(torch.float32, 10, rows))

    weights = ExpertWeights(int4(4096, 7168), int4(7168, 2048))
    laid = FlyDslSource(ReferenceKernels(torch.device("meta")), "gfx942").prepare(weights)
    for matrix in (laid.gate_up, laid.down):
        assert matrix.multipliers is not None
        size = matrix.words.nbytes + matrix.multipliers.nbytes
        assert size == 10 * matrix.rows * matrix.inner * 33 // 64  # 4.125 bits a weight
