"""Which source runs what, and what is said of those that do not."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from composed_kernels import SHAPES, PartSource
from kernel_cases import expert_weights, normal, pairs
from torch import Tensor

from flyray.kernels.composed import ComposedAheadKernels, ComposedKernels, compose, kernel_name
from flyray.kernels.composition import BackendSource, KernelPlan, SourceError, SourceOrder, choose
from flyray.kernels.protocol import (
    ActivationFormat,
    AheadKernels,
    Fp8Matrix,
    Int4Matrix,
    Int4Weight,
    Int8Matrix,
    Int8Weight,
    SamplingRow,
)
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.sampling import SamplingRows
from flyray.kernels.select import NoAccelerator, describe_kernels, plan_kernels, select_kernels
from flyray.kernels.selfcheck import KernelMismatch, self_check
from flyray.kernels.source import KernelShapes, Promise
from flyray.kernels.torch_kernels import TorchKernels


class Rounded(ReferenceKernels):
    """Multiplies in half precision, as a library would."""

    name = "library"

    def linear(self, *arguments: Any) -> Tensor:
        return super().linear(*arguments).to(torch.bfloat16).to(torch.float32)


class Library(PartSource):
    """silu_mul as it should be; linear rounded, which only a user may choose; no INT4."""

    def __init__(self, error: float = 8e-3) -> None:
        super().__init__(Rounded(), {"silu_mul", "linear", "write_kv", "mla_attention", "prepare", "experts"})
        self._error = error

    def promise(self, operation: str) -> Promise:
        return Promise(self._error, "rounds to bfloat16") if operation == "linear" else Promise()


BASE = ReferenceKernels()


def plan(orders: SourceOrder, shapes: KernelShapes = SHAPES, library: Library | None = None) -> KernelPlan:
    return choose([library or Library(), BackendSource(BASE)], shapes, orders)


def composed(orders: SourceOrder, library: Library | None = None) -> ComposedKernels:
    return compose("both", BASE, [library or Library()], plan(orders, library=library))


def test_the_first_that_does_not_refuse_runs() -> None:
    kernels = composed({})
    assert kernel_name(kernels, "silu_mul") == "library.silu_mul"
    assert kernels.source("experts", Int4Matrix) == kernels.source("prepare", Int4Matrix) == "library"
    assert kernels.source("experts", Int8Matrix) == kernels.source("prepare", Int8Matrix) == "reference"
    assert kernels.source("linear", Tensor) == "reference"
    # It has two operations of the three that share a layout.
    assert {kernels.source(each) for each in ("absorb", "write_kv", "mla_attention")} == {"reference"}


def test_what_was_passed_over_is_said() -> None:
    lines = composed({}).plan.lines()
    assert (
        "reference runs experts[Int8Matrix], prepare[Int8Matrix]; library does not: experts: has no Int8Matrix" in lines
    )
    assert "reference runs linear, linear[Int8Weight]; library does not: rounds to bfloat16" in lines
    assert "reference runs linear[Int4Weight]; library does not: linear: has no Int4Weight" in lines
    named = composed({"linear": ["library", "reference"]}).plan.lines()
    assert "library runs linear, linear[Int8Weight] (rounds to bfloat16; within 0.008 of the reference)" in named


def test_a_source_named_alone_must_run() -> None:
    with pytest.raises(
        SourceError, match=r"no source runs linear\[Int4Weight\]: library does not: linear: has no Int4"
    ):
        plan({"linear": ["library"]})
    only = replace(SHAPES, linears=tuple(each for each in SHAPES.linears if each.kind is not Int4Weight))
    assert {each.source for each in plan({"linear": ["library"]}, only).choices if each.operation == "linear"} == {
        "library"
    }
    with pytest.raises(
        SourceError, match="no source runs absorb, mla_attention, write_kv: library does not: has no absorb"
    ):
        plan({"write_kv": ["library"]})


@pytest.mark.parametrize(
    ("orders", "text"),
    [
        ({"matmul": ["library"]}, "'matmul' is no operation; absorb, combine,"),
        ({"silu_mul": ["other"]}, "kernels.silu_mul: 'other' is no source; library, reference are"),
        ({"silu_mul": []}, "kernels.silu_mul: names no source"),
        ({"write_kv": ["reference"], "absorb": ["library"]}, "absorb, write_kv share a layout"),
    ],
)
def test_orders_that_make_no_sense(orders: SourceOrder, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plan(orders)


def test_a_plan_that_cannot_be_followed_here_is_refused() -> None:
    made = plan({}, replace(SHAPES, expert_kinds=(Int8Matrix,)))
    moved = KernelPlan(
        SHAPES, tuple(replace(each, source="library") for each in made.choices if each.kind is Int8Matrix)
    )
    with pytest.raises(SourceError, match=r"has experts\[Int8Matrix\] run by library, which here says: .*Int8Matrix"):
        compose("both", BASE, [Library()], moved)


def test_every_weight_goes_to_the_source_of_its_kind() -> None:
    kernels, x = composed({}), normal(1, 5, 96)
    rows = BASE.quantize(x, ActivationFormat.INT8)
    token, expert = pairs(5, 4, 12)
    for kind in SHAPES.expert_kinds:
        weights = expert_weights(kind, 4, 96, 64)
        taken = kernels.quantize(x, ActivationFormat.FP8) if kind.__name__ == "Fp8Matrix" else rows
        if kind in (Int4Matrix, Int8Matrix):
            expected = BASE.experts(taken, token, expert, weights)
            assert torch.equal(kernels.experts(taken, token, expert, kernels.prepare(weights)), expected)


def test_the_check_allows_what_a_source_promises() -> None:
    from test_torch_kernels import SHAPES as CHECKED

    orders = {"linear": ["library", "reference"]}
    results = self_check(composed(orders), CHECKED, ())
    assert max(each.max_error / each.allowed for each in results if each.operation == "linear") > 1e-2
    with pytest.raises(KernelMismatch, match=r"both.linear: largest error .* against the reference"):
        self_check(composed(orders, Library(1e-4)), CHECKED, ())


def test_steps_run_ahead_where_the_base_lets_them() -> None:
    ahead = TorchKernels(torch.device("cpu"))
    kernels = compose("both", ahead, [], choose([BackendSource(ahead)], SHAPES, {}))
    assert isinstance(kernels, ComposedAheadKernels)
    assert isinstance(kernels, AheadKernels)
    assert not kernels.leaves_out
    assert not isinstance(composed({}), AheadKernels)
    logits = normal(2, 3, 50)
    words = SamplingRows([SamplingRow(1.0, 0.9, 0, 1, 2)] * len(logits)).words
    assert torch.equal(kernels.draw(logits, words).tokens, ahead.draw(logits, words).tokens)


def test_rocm_is_planned_without_a_gpu() -> None:
    shapes = replace(SHAPES, kv_dtype=torch.bfloat16)
    made = plan_kernels("rocm", "auto", shapes, {})
    assert made is not None
    kernels = describe_kernels("rocm", 1, "auto", made)
    assert (kernels.name, kernels.kv_dtype, kernels.device.type) == ("rocm", torch.bfloat16, "meta")
    assert isinstance(kernels, AheadKernels)
    assert kernels.leaves_out
    assert kernel_name(kernels, "linear", Int8Weight) == "triton.linear"
    assert kernel_name(kernels, "experts", Int4Matrix) == f"{'flydsl' if find_spec('flydsl') else 'triton'}.experts"
    assert kernel_name(kernels, "experts", Fp8Matrix) == "triton.experts"
    assert any("flydsl does not: multiplies INT4 and INT8 experts" in line for line in made.lines())
    assert plan_kernels("triton", "auto", shapes, {}) is None
    with pytest.raises(ValueError, match="give it what `plan_kernels` plans"):
        describe_kernels("rocm", 1)


@pytest.mark.skipif(torch.version.hip is not None, reason="this torch is built for ROCm")
def test_rocm_says_what_is_missing() -> None:
    with pytest.raises(NoAccelerator, match=r"computes on AMD's GPUs and needs a torch for ROCm.* is built for C"):
        select_kernels("rocm", 1)
