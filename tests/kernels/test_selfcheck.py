from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import MATRIX_KINDS, paged
from torch import Tensor

from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.protocol import (
    Activations,
    Chunk,
    GateConfig,
    Int4Matrix,
    Int8Matrix,
    Kernels,
    LayerExperts,
    PagedBatch,
)
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.selfcheck import CheckShapes, KernelMismatch, self_check

NANO = CheckShapes(256, 4, 128, 32, 64, 64, 24, 256, 16, GateConfig(4, 1, 1, True, 2.5))
KIMI = CheckShapes(7168, 64, 512, 64, 128, 128, 384, 2048, 64, GateConfig(8, 1, 1, True, 2.827))
GROUPED = CheckShapes(96, 3, 40, 8, 16, 24, 32, 64, 7, GateConfig(4, 8, 3, True, 1.0))


@pytest.mark.parametrize("shapes", [NANO, GROUPED])
def test_backends_pass(kernels: Kernels, shapes: CheckShapes) -> None:
    results = self_check(kernels, shapes, MATRIX_KINDS)
    checked = {result.operation.partition("[")[0] for result in results}
    operations = {name for name in vars(Kernels) if not name.startswith("_")} - {"prepare"}  # a part of experts
    assert checked == operations
    for result in results:
        assert result.max_error <= result.allowed
        if "Int" in result.operation:
            assert result.allowed == 0.0


def test_kv_pages_in_8_bits_pass(rounding: Kernels) -> None:
    results = self_check(rounding, GROUPED, ())
    assert [result.allowed for result in results if result.operation == "write_kv"] == [0.0]


def test_passes_at_full_size() -> None:
    kernels = CpuKernels(1)
    results = self_check(kernels, KIMI, (Int4Matrix,))
    assert all(result.max_error <= result.allowed for result in results)
    kernels.close()


class OffByOneUnit(ReferenceKernels):
    """Breaks one value of the INT8 experts by the smallest step there is."""

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: LayerExperts) -> Tensor:
        result = super().experts(x, pair_token, pair_expert, weights)
        result[-1, -1] = torch.nextafter(result[-1, -1], torch.tensor(torch.inf))
        return result


class LastKeyMissed(ReferenceKernels):
    """Sees one key too few."""

    def mla_attention(self, q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, kv_lora_rank: int) -> Tensor:
        lengths = (batch.context_len - 1).tolist()
        counts = batch.query_start.diff().tolist()
        shorter, _ = paged(counts, lengths, pages.shape[1], 0, 0)
        table = batch.page_table[:, : shorter.page_table.shape[1]].contiguous()
        cut = PagedBatch(batch.query_start, shorter.context_len, table, batch.positions - 1, batch.slots)
        return super().mla_attention(q, pages, cut, scale, kv_lora_rank)


class NotANumber(ReferenceKernels):
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return super().silu_mul(gate_up) * torch.nan


class ScaleHalved(ReferenceKernels):
    """Writes entries in INT8 whose scales are half as large."""

    def write_kv(self, pages: Tensor, slots: Tensor, rows: Tensor, norm: Tensor, *others: Any) -> None:
        super().write_kv(pages, slots, rows, norm / 2, *others)


class DiagonalMissed(ReferenceKernels):
    """Expanded, no query of a chunk sees its own entry."""

    def expanded_attention(self, q: Tensor, pages: Tensor, batch: PagedBatch, chunk: Chunk, *others: Any) -> None:
        shorter = replace(chunk, context=chunk.context - 1)
        super().expanded_attention(q, pages, batch, shorter, *others)


def test_expanded_attention_is_compared_where_it_is_used() -> None:
    assert self_check(ReferenceKernels(), NANO, (), expanded=True)[-1].operation == "expanded_attention"
    assert self_check(DiagonalMissed(), NANO, ())[-1].operation != "expanded_attention"
    with pytest.raises(KernelMismatch, match=r"expanded_attention: largest error .* allowed"):
        self_check(DiagonalMissed(), NANO, (), expanded=True)


def test_wrong_entries_in_8_bits_are_caught() -> None:
    with pytest.raises(KernelMismatch, match="write_kv: largest error"):
        self_check(ScaleHalved(kv_dtype=torch.int8), NANO, ())


@pytest.mark.parametrize(
    ("broken", "operation"),
    [(OffByOneUnit, "experts\\[Int8Matrix\\]"), (LastKeyMissed, "mla_attention"), (NotANumber, "silu_mul")],
)
def test_a_broken_backend_is_caught_with_numbers(broken: type[ReferenceKernels], operation: str) -> None:
    with pytest.raises(KernelMismatch, match=f"{operation}: largest error .* allowed"):
        self_check(broken(), NANO, (Int8Matrix,))
