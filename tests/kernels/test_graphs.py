"""Graphs: what was captured runs again on the same tensors, with the results of calls one by one."""

from __future__ import annotations

import threading

import pytest
import torch
from kernel_cases import expert_weights, int8_weight, normal, paged
from torch import Tensor

from flyray.kernels.cpu.arena import Arena
from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.cpu.graph import CpuGraph
from flyray.kernels.protocol import ActivationFormat, GateConfig, Graph, Int4Matrix, Kernels
from flyray.kernels.reference import ReferenceKernels

GATE = GateConfig(2, 1, 1, True, 1.5)
ROWS, HIDDEN, RANK, ROPE, HEADS = 3, 64, 24, 8, 2
NOPE = 12
NORM, LATENT_NORM = normal(1, HIDDEN), normal(11, RANK)
WEIGHT = normal(2, HEADS * (NOPE + ROPE), HIDDEN) / 8
ABSORBED = normal(12, HEADS, RANK, NOPE).bfloat16()
DOUBLE, MLP = normal(13, 2 * HIDDEN, HIDDEN), (int8_weight(48, HIDDEN), int8_weight(HIDDEN, 24))
SQUARE = int8_weight(HIDDEN, HIDDEN, 1)
OUTPUT = normal(3, HIDDEN, HEADS * RANK).bfloat16()
KV = normal(4, RANK + ROPE, HIDDEN) / 8
ROUTER, BIAS = normal(5, 4, HIDDEN), torch.zeros(4)
EXPERTS = expert_weights(Int4Matrix, 4, HIDDEN, 32)
PAIR_TOKEN = torch.arange(ROWS, dtype=torch.int32).repeat_interleave(GATE.top_k)
ANGLES = normal(6, 40, ROPE // 2)
BATCH, PAGES = paged([1, 1, 1], [3, 9, 1], 4, 0, 1)
EMBEDDING = normal(7, 20, HIDDEN).bfloat16()


def layer(k: Kernels, tokens: Tensor, pages: Tensor) -> Tensor:
    """Every operation but `sample`, in a chain: tokens [T] -> [T, D]."""
    x = k.take_rows(EMBEDDING, tokens)
    normed = k.rms_norm(x, NORM, 1e-6)
    k.write_kv(pages, BATCH.slots, k.linear(normed, KV), LATENT_NORM, 1e-6, BATCH.positions, ANGLES, ANGLES)
    heads = k.linear(normed, WEIGHT).unflatten(1, (HEADS, NOPE + ROPE))
    q = k.absorb(heads, ABSORBED, BATCH.positions, ANGLES, ANGLES)
    seen = k.mla_attention(q, pages, BATCH, 0.2, RANK)
    hidden = k.linear(seen.flatten(1), OUTPUT, x)
    normed, rows = k.rms_norm_quantize(hidden, NORM, 1e-6)
    ids, weights = k.gate(normed, ROUTER, BIAS, GATE)
    shared = k.mlp(k.quantize(k.silu_mul(k.linear(normed, DOUBLE)), ActivationFormat.INT8), *MLP, normed)
    shared = k.linear(k.rms_norm_quantize(shared, NORM, 1e-6, floats=False)[1], SQUARE, shared)
    slots = k.experts(rows, PAIR_TOKEN, ids.flatten(), EXPERTS)
    return k.combine(slots.unflatten(0, (ROWS, GATE.top_k)), weights, shared, hidden)


def added(k: Kernels, x: Tensor, y: Tensor) -> Tensor:
    """x + y, by one operation: no slots are combined."""
    return k.combine(torch.empty(len(x), 0, x.shape[1]), torch.empty(len(x), 0), y, x)


def empty_pages() -> Tensor:
    return torch.zeros(PAGES, 4, RANK + ROPE)


def test_a_replay_computes_what_calls_compute(kernels: Kernels) -> None:
    tokens, pages = torch.tensor([4, 0, 19]), empty_pages()
    graph: Graph[Tensor] = kernels.capture(lambda: layer(kernels, tokens, pages))
    first = graph.result.clone()
    assert torch.equal(first, layer(kernels, tokens, empty_pages()))
    tokens.copy_(torch.tensor([1, 2, 3]))
    graph.replay()
    eager_pages = empty_pages()
    assert torch.equal(graph.result, layer(kernels, tokens, eager_pages))
    assert torch.equal(pages, eager_pages)
    assert not torch.equal(graph.result, first)


def test_a_replay_refuses_indices_outside_their_tensor(kernels: Kernels) -> None:
    tokens = torch.tensor([4, 0, 19])
    graph = kernels.capture(lambda: kernels.take_rows(EMBEDDING, tokens))
    tokens[1] = 20
    with pytest.raises(ValueError, match="take_rows: rows\\[1\\] is 20, expected 0 to 19"):
        graph.replay()


def test_graphs_beside_one_another_keep_what_is_held(kernels: Kernels) -> None:
    """The second graph reads what the first left; what neither holds may be overwritten."""
    x = normal(9, ROWS, HIDDEN)
    first = kernels.capture(lambda: added(kernels, added(kernels, x, x), x))
    second = kernels.capture(lambda: added(kernels, first.result, added(kernels, x, x)), beside=first)
    x.copy_(normal(10, ROWS, HIDDEN))
    first.replay()
    second.replay()
    assert torch.equal(first.result, x + x + x)
    assert torch.equal(second.result, first.result + (x + x))


def test_moving_rows(kernels: Kernels) -> None:
    rows, table = torch.tensor([3, 0, 3]), normal(2, 5, 40)
    assert torch.equal(kernels.take_rows(table, rows), table[rows])
    assert torch.equal(kernels.take_rows(table.bfloat16(), rows), table.bfloat16()[rows].float())
    large = normal(3, 300, 200)  # more than one task
    assert torch.equal(kernels.take_rows(large, torch.arange(299, -1, -1)), large.flip(0))


def test_a_capture_computes_with_other_threads_beside_it(cpu: CpuKernels) -> None:
    """Another thread's calls are not recorded."""
    x = normal(1, ROWS, HIDDEN)

    def run() -> Tensor:
        other = threading.Thread(target=lambda: cpu.silu_mul(x))
        other.start()
        other.join()
        return added(cpu, x, x)

    once, with_other = cpu.capture(lambda: added(cpu, x, x)), cpu.capture(run)
    assert isinstance(once, CpuGraph)
    assert isinstance(with_other, CpuGraph)
    assert len(with_other.commands) == len(once.commands)


def test_captures_do_not_nest(cpu: CpuKernels) -> None:
    x = normal(1, ROWS, HIDDEN)
    with pytest.raises(ValueError, match="captures do not nest"):
        cpu.capture(lambda: cpu.capture(lambda: added(cpu, x, x)))
    other = ReferenceKernels().capture(lambda: x)
    with pytest.raises(ValueError, match="beside is a RepeatedGraph"):
        cpu.capture(lambda: added(cpu, x, x), beside=other)


def test_joined_operations_compute_what_calls_compute(cpu: CpuKernels) -> None:
    tokens, pages, eager_pages = torch.tensor([4, 0, 19]), empty_pages(), empty_pages()
    first = cpu.joined(lambda: layer(cpu, tokens, pages))
    second = cpu.joined(lambda: layer(cpu, tokens + 1 - tokens, empty_pages()))
    assert torch.equal(first, layer(cpu, tokens, eager_pages)), "what is held stays"
    assert torch.equal(pages, eager_pages)
    assert torch.equal(second, layer(cpu, torch.ones_like(tokens), empty_pages()))
    with pytest.raises(ValueError, match="take_rows: rows\\[2\\] is 19, expected 0 to 9"):
        cpu.joined(lambda: cpu.take_rows(EMBEDDING[:10], tokens))


def test_the_memory_of_what_nobody_holds_is_used_again() -> None:
    arena = Arena()
    first = arena.empty((4, 6), torch.float32)
    address, view = first.data_ptr(), first[1:].flatten()
    del first
    assert arena.empty((4, 6), torch.float32).data_ptr() != address, "a view holds it"
    del view
    assert arena.empty((65,), torch.int8).data_ptr() == address, "another size that rounds up to the same"
    assert arena.empty((129,), torch.int8).data_ptr() != address
    assert arena.empty((0, 3), torch.int32).shape == (0, 3)
    assert arena.empty((3,), torch.int8).data_ptr() % 64 == 0


def test_large_results_come_back_in_the_memory_of_those_before(cpu: CpuKernels) -> None:
    x = normal(1, 200, 300)
    first = added(cpu, x, x)
    address = first.data_ptr()
    other = added(cpu, first, x)
    assert other.data_ptr() != address
    assert torch.equal(other, x + x + x)
    del first
    assert added(cpu, x[:199], x[:199]).data_ptr() == address
    assert torch.equal(other, x + x + x)


def test_a_graph_holds_what_it_reads(cpu: CpuKernels) -> None:
    """The words have addresses only: without the graph's hold they would name memory that is another's."""
    inputs = [normal(1, 400, HIDDEN)]
    expected = inputs[0] + inputs[0]
    graph = cpu.capture(lambda: added(cpu, inputs[0], inputs[0]))
    inputs.clear()
    others = [torch.zeros(400, HIDDEN) for _ in range(8)]
    graph.replay()
    assert torch.equal(graph.result, expected)
    assert len(others) == 8
