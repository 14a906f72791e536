"""The AITER adapter against the reference, over an emulation of AITER from its documentation: see `aiter_emulation`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from aiter_emulation import emulated, listed_keys
from aiter_signatures import recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import MATRIX_KINDS, expert_weights, int8_weight, normal, paged, pairs, unchanged
from torch import Tensor

from flyray.kernels.aiter import attention
from flyray.kernels.aiter.backend import AiterKernels
from flyray.kernels.aiter.source import AiterSource
from flyray.kernels.composed import compose
from flyray.kernels.composition import BackendSource, choose
from flyray.kernels.protocol import (
    ActivationFormat,
    Activations,
    Bf16Matrix,
    ExpertMatrix,
    GateConfig,
    Int4Matrix,
    Int8Matrix,
    Int8Weight,
    PagedBatch,
    activation_format,
)
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.selfcheck import CheckShapes, self_check
from flyray.kernels.source import KernelShapes, LinearShape

RELEASES = recorded()
NEWEST = "main, August 2026"
REFERENCE = ReferenceKernels()
KIMI = KernelShapes(
    7168, 64, 1536, 512, 128, 64, 128, 2048, 384, 128, GateConfig(8, 1, 1, True, 2.827),
    (Int8Matrix,), (LinearShape(Int8Weight, 1536, 7168),), torch.bfloat16, 16,
)  # fmt: skip


def adapter(release: str = NEWEST, called: set[str] | None = None) -> AiterKernels:
    return AiterKernels(ReferenceKernels(kv_dtype=torch.bfloat16), emulated(RELEASES[release], called), listed_keys)


def close(actual: Tensor, expected: Tensor, relative: float) -> None:
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def attended(kernels: AiterKernels, heads: int, batch: PagedBatch, pages: int, size: int) -> tuple[Tensor, Tensor]:
    """The adapter's result and the reference's, of the same queries and entries in bfloat16."""
    q = normal(1, len(batch.positions), heads, 576).bfloat16().float()
    entries = normal(2, pages, size, 576).bfloat16()
    rows = entries.float().flatten(0, 1)
    written = torch.zeros_like(entries)
    kernels.write_kv(written, torch.arange(len(rows)), *unchanged(rows, 512))
    assert torch.equal(written, entries)
    expected = REFERENCE.mla_attention(q, entries.float(), batch, 0.07, 512)
    return kernels.mla_attention(q, written, batch, 0.07, 512), expected


@pytest.mark.parametrize("release", RELEASES)
def test_every_operation_in_every_release(release: str) -> None:
    called: set[str] = set()
    kernels = adapter(release, called)
    batch, pages = paged([3, 1], [5, 18], 4, 2, 0)
    close(*attended(kernels, 16, batch, pages, 4), 1e-2)

    x, weight = normal(3, 5, 256), normal(4, 256).bfloat16()
    close(kernels.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5), 1e-2)
    normed, rows = kernels.rms_norm_quantize(x[:, :128], weight[:128].contiguous(), 1e-5)
    close(normed, REFERENCE.rms_norm(x[:, :128], weight[:128].contiguous(), 1e-5), 1e-2)
    same(rows, REFERENCE.quantize(normed, ActivationFormat.INT8))
    x[1] = 0.0
    same(kernels.quantize(x, ActivationFormat.INT8), REFERENCE.quantize(x, ActivationFormat.INT8))
    for format in (ActivationFormat.FP8, ActivationFormat.FLOAT):
        assert torch.equal(kernels.quantize(x, format).values.float(), REFERENCE.quantize(x, format).values.float())
    close(kernels.silu_mul(x), REFERENCE.silu_mul(x), 2e-2)

    positions, table = torch.tensor([4, 0, 7, 7, 1]), torch.rand(8, 32)
    q, up = normal(6, 5, 2, 40 + 64), normal(7, 2, 512, 40).bfloat16()
    absorbed = kernels.absorb(q, up, positions, table.cos(), table.sin())
    assert torch.equal(absorbed, REFERENCE.absorb(q, up, positions, table.cos(), table.sin()).bfloat16())

    linear = int8_weight(48, 256)
    close(kernels.linear(x, linear), REFERENCE.linear(x, linear), 1e-2)
    rows, residual = REFERENCE.quantize(x, ActivationFormat.INT8), normal(10, 5, 48)
    close(kernels.linear(rows, linear, residual), REFERENCE.linear(rows, linear, residual), 1e-2)
    for config in (GateConfig(6, 1, 1, True, 2.8), GateConfig(5, 8, 3, False, 1.0)):
        arguments = x, normal(8, 64, 256) * 0.1, normal(9, 64) * 0.1, config
        ids, weights = kernels.gate(*arguments)
        wanted_ids, wanted = REFERENCE.gate(*arguments)
        kept = [0, 2, 3, 4]  # row 1 is all ties: which of them is AITER's own choice
        assert torch.equal(ids[kept], wanted_ids[kept])
        close(weights[kept], wanted[kept], 1e-5)
    for kind in MATRIX_KINDS:
        if kind is not Int4Matrix or release == NEWEST:
            close(*expert_rows(kernels, kind), 4e-2)
    assert called == RELEASES[release].keys()


def same(actual: Activations, expected: Activations) -> None:
    """INT8 rows within what rounding their input to bfloat16 changes."""
    assert actual.scale is not None
    assert expected.scale is not None
    assert (actual.values.int() - expected.values.int()).abs().max() <= 1
    close(actual.scale, expected.scale, 4e-3)


def expert_rows(kernels: AiterKernels, kind: type[ExpertMatrix]) -> tuple[Tensor, Tensor]:
    weights, (token, expert) = expert_weights(kind, 3, 256, 128), pairs(5, 3, 12)
    x = REFERENCE.quantize(normal(1, 5, 256), activation_format(weights.down))
    prepared = kernels.prepare(weights)
    assert torch.equal(kernels.experts(x, token, expert, weights), kernels.experts(x, token, expert, prepared))
    return kernels.experts(x, token, expert, prepared), REFERENCE.experts(x, token, expert, weights)


@pytest.mark.parametrize("heads", [8, 64, 72, 128])
def test_every_number_of_heads_is_attended_in_groups_that_all_releases_have(heads: int) -> None:
    batch, pages = paged([2, 1], [2, 9], 8, 1, 1)
    for release in RELEASES:
        close(*attended(adapter(release), heads, batch, pages, 8), 1e-2)


def test_a_head_has_the_same_bits_on_any_number_of_shards() -> None:
    kernels = adapter()
    batch, pages = paged([2, 1], [2, 9], 8, 1, 1)
    q, entries = normal(1, 3, 128, 576), normal(2, pages, 8, 576).bfloat16()
    whole = kernels.mla_attention(q, entries, batch, 0.07, 512)
    for heads in (slice(0, 64), slice(64, 128), slice(43, 86)):
        part = kernels.mla_attention(q[:, heads].contiguous(), entries, batch, 0.07, 512)
        assert torch.equal(part, whole[:, heads])


def test_a_query_has_the_same_bits_in_any_batch_and_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = adapter()
    batch, pages = paged([4, 0, 1, 2], [9, 3, 12, 2], 4, 3, 2)
    whole, _ = attended(kernels, 64, batch, pages, 4)
    # The prompt of the first sequence again, token by token, beside others that go on.
    q, entries = normal(1, 7, 64, 576), normal(2, pages, 4, 576).bfloat16()
    for query in range(4):
        ends = torch.tensor([0, 1, 2], dtype=torch.int32)
        lengths = torch.tensor([6 + query, 10], dtype=torch.int32)
        rows = torch.tensor([query, 6])
        one = PagedBatch(ends, lengths, batch.page_table[[0, 2]], lengths.long() - 1, batch.slots[rows])
        decoded = kernels.mla_attention(q[rows], entries, one, 0.07, 512)
        assert torch.equal(decoded[0], kernels.mla_attention(q, entries, batch, 0.07, 512)[query])
    monkeypatch.setattr(attention, "ROWS", 3)
    in_calls, _ = attended(kernels, 64, batch, pages, 4)
    assert torch.equal(in_calls, whole)
    monkeypatch.setattr(attention, "_INDICES", 1)
    alone, _ = attended(kernels, 64, batch, pages, 4)
    assert torch.equal(alone, whole)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), min_size=1, max_size=5),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 9),
)
def test_attention_of_any_batch(sequences: list[tuple[int, int]], page_size: int, seed: int) -> None:
    queries, contexts = [min(each) for each in sequences], [length for _, length in sequences]
    batch, pages = paged(queries, contexts, page_size, 2, seed)
    if sum(queries):
        close(*attended(adapter(), 24, batch, pages, page_size), 1e-2)


def test_experts_below_zero_are_left_out_and_unknown_pages_are_not_followed() -> None:
    kernels = adapter()
    weights = expert_weights(Int8Matrix, 2, 128, 128)
    x = REFERENCE.quantize(normal(1, 3, 128), ActivationFormat.INT8)
    token, expert = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, -1, 0], dtype=torch.int32)
    actual = kernels.experts(x, token, expert, weights)
    expected = REFERENCE.experts(x, token[::2].contiguous(), expert[::2].contiguous(), weights)
    close(actual[::2], expected, 2e-2)
    assert not actual[1].any()  # it visited the expert beyond the last one, which is not here
    unused = torch.zeros(2, dtype=torch.int64)
    ends = torch.tensor([0, 1, 2], dtype=torch.int32)
    table = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int32)
    batch = PagedBatch(ends, torch.tensor([3, 0], dtype=torch.int32), table, torch.tensor([2, 0]), unused)
    lists = listed_keys(batch, slice(0, 2), 4, 2, 8)
    assert lists.starts.tolist() == [0, 3, 6, 7, 8]
    assert lists.slots.tolist() == [4, 5, 6, 4, 5, 6, 0, 0]


def test_nothing_is_called_for_no_rows() -> None:
    kernels = adapter()
    nobody = torch.empty(0, dtype=torch.int32)
    weights = expert_weights(Bf16Matrix, 2, 128, 128)
    none = Activations(ActivationFormat.FLOAT, torch.empty(0, 128), None)
    assert kernels.experts(none, nobody, nobody, weights).shape == (0, 128)
    assert kernels.rms_norm(torch.empty(0, 128), torch.ones(128), 1e-5).shape == (0, 128)
    assert kernels.linear(torch.empty(0, 32), int8_weight(8, 32)).shape == (0, 8)
    assert kernels.quantize(torch.empty(0, 8), ActivationFormat.INT8).values.shape == (0, 8)
    assert kernels.silu_mul(torch.empty(0, 8)).shape == (0, 4)


def test_other_shapes_are_refused() -> None:
    kernels = adapter()
    with pytest.raises(ValueError, match="gate: n_group is 2 and top_k 1, which AITER does not run"):
        kernels.gate(normal(1, 2, 8), normal(2, 8, 8), torch.zeros(8), GateConfig(1, 2, 1, True, 1.0))
    with pytest.raises(ValueError, match=r"experts: weights\.gate_up has N = 128 and K = 64"):
        kernels.prepare(expert_weights(Int8Matrix, 1, 64, 64))
    with pytest.raises(ValueError, match="write_kv: pages has entries of 24 and 8 values"):
        kernels.write_kv(torch.zeros(1, 4, 32).bfloat16(), torch.zeros(1).long(), *unchanged(normal(1, 1, 32), 24))
    x = REFERENCE.quantize(normal(1, 1, 128), ActivationFormat.INT8)
    laid_out = kernels.prepare(expert_weights(Int8Matrix, 1, 128, 128))
    nobody = torch.empty(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="experts: weights is AiterExperts, another backend's layout"):
        REFERENCE.experts(x, nobody, nobody, laid_out)
    with pytest.raises(ValueError, match=r"experts: x\.values is float32 \[1, 64\], expected int8 \[1, 128\]"):
        kernels.experts(Activations(ActivationFormat.INT8, normal(1, 1, 64), x.scale), nobody, nobody, laid_out)


FAULTS = [
    ("mla_attention", None, {"kv_lora_rank": 256}, "kv_lora_rank and qk_rope_head_dim: are 256 and 64, expected 512"),
    ("write_kv", None, {"kv_dtype": torch.int8}, "kv_dtype: is torch.int8, expected torch.bfloat16"),
    ("absorb", None, {"kv_dtype": torch.float32}, "kv_dtype: is torch.float32"),
    ("gate", None, {"gate": GateConfig(8, 4, 2, True, 1.0)}, "n_group: is 4, expected 1 or 8"),
    ("gate", None, {"gate": GateConfig(65, 1, 1, True, 1.0)}, "top_k: is 65, expected at most 64"),
    ("linear", torch.Tensor, {}, "weights: are Tensor, expected Int8Weight"),
    ("linear", Int8Weight, {"linears": (LinearShape(Int8Weight, 8, 40),)}, "columns: a linear has 40"),
    (
        "experts",
        Int8Matrix,
        {"moe_intermediate_size": 192},
        "moe_intermediate_size: is 192, expected a multiple of 128",
    ),
    ("prepare", Int8Matrix, {"hidden_size": 96}, "hidden_size: is 96"),
    ("sample", None, {}, "operation: AITER has no sample"),
]


@pytest.mark.parametrize(("operation", "kind", "changes", "reason"), FAULTS)
def test_what_does_not_fit_is_refused_by_name(
    operation: str, kind: type | None, changes: dict[str, object], reason: str
) -> None:
    source = AiterSource(REFERENCE, "gfx942", adapter())
    assert source.refusal(operation, kind, replace(KIMI, **changes)).startswith(reason)


def test_the_self_check_passes_with_all_that_aiter_has_and_with_what_it_runs_unasked() -> None:
    sources = [AiterSource(REFERENCE, "gfx942", adapter()), BackendSource(REFERENCE)]
    kinds = MATRIX_KINDS
    shapes = replace(KIMI, hidden_size=256, heads=16, expert_kinds=kinds, gate=GateConfig(4, 1, 1, True, 2.5))
    checked = CheckShapes(256, 16, 512, 64, 32, 64, 24, 256, 16, shapes.gate)
    named = dict.fromkeys(sources[0].operations, ("aiter", "reference"))
    for orders in (named, {}):
        plan = choose(sources, shapes, orders)
        kernels = compose("both", REFERENCE, sources[:1], plan)
        ran = {choice.operation for choice in plan.choices if choice.source == "aiter"}
        assert ran == (named.keys() if orders else {"absorb", "write_kv", "mla_attention"})
        for result in self_check(kernels, checked, kinds):
            assert result.max_error <= result.allowed


def test_kimis_shapes_fit_and_what_breaks_the_protocol_is_reserved() -> None:
    source = AiterSource(REFERENCE, "gfx942", adapter())
    kinds = {"linear": Int8Weight, "prepare": Int8Matrix, "experts": Int8Matrix}
    for operation in source.operations:
        assert source.refusal(operation, kinds.get(operation), KIMI) == ""
    unreserved = {operation for operation in source.operations if not source.promise(operation).reservation}
    assert unreserved == {"absorb", "write_kv", "mla_attention", "prepare"}
    assert AiterSource(REFERENCE, "gfx950").refusal("gate", None, KIMI).startswith("target: is gfx950, expected gfx942")
    # Here is no AITER; a machine that has it would say nothing or name the parameter that does not fit.
    assert AiterSource(REFERENCE, "gfx942").refusal("gate", None, KIMI).startswith("package: ")
