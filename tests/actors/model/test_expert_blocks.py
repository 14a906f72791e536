"""Blocks of experts: how experts are grouped does not change a bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_checkpoint import TEXT, cycle, dense_tensors, write_mixed
from torch import Tensor

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.expert_blocks import ExpertBlocks
from flyray.actors.model.expert_reader import ExpertReader
from flyray.actors.model.weight_memory import WeightMemory
from flyray.kernels.cpu.converter import CpuConverter
from flyray.kernels.flydsl.layout import wave_experts
from flyray.kernels.protocol import (
    ActivationFormat,
    Activations,
    Bf16Matrix,
    ExpertMatrix,
    ExpertWeights,
    Int4Matrix,
    Int8Matrix,
    Kernels,
    LayerExperts,
    matrix_kind,
)
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.select import CPU_BACKENDS, select_kernels
from flyray.kernels.selfcheck import random_matrix
from flyray.kernels.triton.layouts import tile_experts

EXPERTS, LAYER = 8, 1
REFERENCE = ReferenceKernels()
FORMATS = ("w4a8", "w8a8", "w4a8-channel")


def reader(path: Path, kernels: Kernels = REFERENCE) -> ExpertReader:
    checkpoint = Checkpoint(path)
    config, memory = ModelConfig.from_dict(checkpoint.config), WeightMemory(torch.device("cpu"))
    return ExpertReader(checkpoint, config, kernels, memory, CpuConverter(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same weights in each format, and with the formats in turn."""
    dense = dense_tensors(3)
    folder = tmp_path_factory.mktemp("blocks")
    uniform = {format: write_mixed(folder / format, dense, cycle(format)) for format in FORMATS}
    return SimpleNamespace(mixed=write_mixed(folder / "mixed", dense, cycle(*FORMATS)), **uniform, uniform=uniform)


def pairs(kernels: Kernels) -> tuple[Activations, Tensor, Tensor]:
    """Every expert runs for some of 12 tokens, in no order."""
    generator = torch.Generator().manual_seed(5)
    x = kernels.quantize(torch.randn(12, TEXT["hidden_size"], generator=generator), ActivationFormat.INT8)
    order = torch.randperm(12 * EXPERTS, generator=generator)[:60]
    return x, (order // EXPERTS).to(torch.int32), (order % EXPERTS).to(torch.int32)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_each_expert_gives_what_it_gives_in_a_checkpoint_of_its_format(backend: str, folders: SimpleNamespace) -> None:
    kernels = select_kernels(backend, 1)
    x, token, expert = pairs(kernels)
    chosen = [cycle(*FORMATS)(LAYER, each) for each in range(EXPERTS)]
    mixed = reader(folders.mixed).read(LAYER, range(EXPERTS), chosen)
    assert {type(block.gate_up) for block in mixed.blocks} == {Int4Matrix, Int8Matrix}
    found = mixed.run(kernels, x, token, expert)
    for format, path in folders.uniform.items():
        uniform = reader(path).read(LAYER, range(EXPERTS), [format] * EXPERTS)
        assert len(uniform.blocks) == 1
        here = torch.tensor([chosen[each] == format for each in expert.tolist()])
        assert torch.equal(found[here], uniform.run(kernels, x, token, expert)[here])
        assert not torch.equal(found, uniform.run(kernels, x, token, expert))


@settings(deadline=None, max_examples=30)
@given(groups=st.lists(st.integers(0, 3), min_size=EXPERTS, max_size=EXPERTS), backend=st.sampled_from(CPU_BACKENDS))
def test_the_grouping_changes_nothing(groups: list[int], backend: str, folders: SimpleNamespace) -> None:
    kernels, source = select_kernels(backend, 1), reader(folders.w4a8)
    x, token, expert = pairs(kernels)
    members = [[e for e in range(EXPERTS) if groups[e] == group] for group in sorted(set(groups))]
    blocks = [(each, source.block(LAYER, each, ["w4a8"] * len(each))) for each in members]
    found = ExpertBlocks.of(blocks, torch.device("cpu"))
    whole = source.read(LAYER, range(EXPERTS), ["w4a8"] * EXPERTS)
    assert torch.equal(found.run(kernels, x, token, expert), whole.run(kernels, x, token, expert))
    for each in range(EXPERTS):
        (ours, place), (theirs, same) = found.find(each), whole.find(each)
        assert same == each
        assert torch.equal(ours.down.scale[place], theirs.down.scale[each])


def test_replaced_experts_come_from_the_new_weights_and_empty_blocks_go(folders: SimpleNamespace) -> None:
    kernels = select_kernels("cpu", 1)
    x, token, expert = pairs(kernels)
    low, high = (
        reader(path).read(LAYER, range(EXPERTS), [format] * EXPERTS)
        for format, path in (("w4a8", folders.w4a8), ("w8a8", folders.uniform["w8a8"]))
    )
    source = reader(folders.uniform["w8a8"])
    part = low.replaced([1, 6], source.block(LAYER, [1, 6], ["w8a8"] * 2))
    new = (expert == 1) | (expert == 6)
    found = part.run(kernels, x, token, expert)
    assert torch.equal(found[new], high.run(kernels, x, token, expert)[new])
    assert torch.equal(found[~new], low.run(kernels, x, token, expert)[~new])
    every = part.replaced(range(EXPERTS), source.block(LAYER, range(EXPERTS), ["w8a8"] * EXPERTS))
    assert len(every.blocks) == 1
    assert torch.equal(every.run(kernels, x, token, expert), high.run(kernels, x, token, expert))


@dataclass(frozen=True)
class Turned:
    """A matrix with its experts in the reverse order."""

    kind: type[ExpertMatrix]
    parts: tuple[Tensor, ...]


@dataclass(frozen=True)
class TurnedExperts:
    gate_up: Turned
    down: Turned


class TurningKernels(ReferenceKernels):
    """A backend with a layout of its own."""

    def prepare(self, weights: ExpertWeights) -> TurnedExperts:
        turned = (Turned(type(each), tuple(p.flip(0) for p in vars(each).values())) for each in vars(weights).values())
        return TurnedExperts(*turned)

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: LayerExperts) -> Tensor:
        assert isinstance(weights, TurnedExperts)
        plain = ExpertWeights(*(each.kind(*each.parts) for each in (weights.gate_up, weights.down)))
        last = len(weights.down.parts[0]) - 1
        return super().experts(x, pair_token, last - pair_expert, plain)


def test_blocks_are_laid_out_once_when_they_are_read(folders: SimpleNamespace) -> None:
    kernels = TurningKernels()
    x, token, expert = pairs(kernels)
    chosen = [cycle(*FORMATS)(LAYER, each) for each in range(EXPERTS)]
    plain = reader(folders.mixed).read(LAYER, range(EXPERTS), chosen)
    turned = reader(folders.mixed, kernels).read(LAYER, range(EXPERTS), chosen)
    assert (plain.prepared, turned.prepared) == (False, True)
    assert turned.activations is plain.activations
    assert torch.equal(turned.run(kernels, x, token, expert), plain.run(REFERENCE, x, token, expert))
    assert {matrix_kind(block.down) for block in turned.blocks} == {Int4Matrix, Int8Matrix}
    w8a8 = folders.uniform["w8a8"]
    expected = plain.replaced([1, 6], reader(w8a8).block(LAYER, [1, 6], ["w8a8"] * 2))
    replaced = turned.replaced([1, 6], reader(w8a8, kernels).block(LAYER, [1, 6], ["w8a8"] * 2))
    assert torch.equal(replaced.run(kernels, x, token, expert), expected.run(REFERENCE, x, token, expert))
    with pytest.raises(ValueError, match="expert 3 is in a backend's layout, TurnedExperts: it can only be run"):
        turned.find(3)
    for other in CPU_BACKENDS:
        with pytest.raises(ValueError, match="weights is TurnedExperts, another backend's layout"):
            turned.run(select_kernels(other, 1), x, token, expert)


def test_no_pairs(folders: SimpleNamespace) -> None:
    kernels = select_kernels("cpu", 1)
    mixed = reader(folders.mixed).read(LAYER, range(EXPERTS), [cycle(*FORMATS)(LAYER, e) for e in range(EXPERTS)])
    none = torch.zeros(0, dtype=torch.int32)
    assert mixed.run(kernels, pairs(kernels)[0], none, none).shape == (0, TEXT["hidden_size"])


def test_blocks_hold_each_expert_once(folders: SimpleNamespace) -> None:
    block = reader(folders.w4a8).block(LAYER, [0, 1], ["w4a8"] * 2)
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="do not hold each of 3 experts once"):
        ExpertBlocks.of([([0, 1], block), ([1], block)], device)
    with pytest.raises(ValueError, match=r"ascending order, are \[1, 0\]"):
        ExpertBlocks.of([([1, 0], block)], device)
    with pytest.raises(ValueError, match=r"ascending order, each once, are \[1, 1\]"):
        ExpertBlocks.of([([0, 1], block)], device).replaced([1, 1], block)


def random_experts(kind: type[ExpertMatrix], count: int, seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    return ExpertWeights(random_matrix(kind, count, 128, 96, generator), random_matrix(kind, count, 96, 64, generator))


def with_expert(weights: ExpertWeights, slot: int, other: ExpertWeights) -> ExpertWeights:
    """The same with another one in a slot."""
    changed = []
    for matrix, single in ((weights.gate_up, other.gate_up), (weights.down, other.down)):
        parts = {name: values.clone() for name, values in vars(matrix).items()}
        for name, values in vars(single).items():
            parts[name][slot] = values[0]
        changed.append(type(matrix)(**parts))
    return ExpertWeights(*changed)


@pytest.mark.parametrize("prepare", [lambda weights: weights, tile_experts, wave_experts])
@pytest.mark.parametrize("kind", [Int4Matrix, Int8Matrix])
def test_an_expert_is_overwritten_where_it_lies(
    prepare: Callable[[ExpertWeights], LayerExperts], kind: type[ExpertMatrix]
) -> None:
    weights, other = random_experts(kind, 4, 1), random_experts(kind, 1, 2)
    expected = prepare(with_expert(weights, 2, other))
    blocks = ExpertBlocks.of([(range(4), prepare(weights))], torch.device("cpu"))
    blocks.put(2, prepare(other))
    for name in ("gate_up", "down"):
        here, there = vars(getattr(blocks.blocks[0], name)), vars(getattr(expected, name))
        assert any(isinstance(value, Tensor) for value in here.values())
        for part, value in here.items():
            assert not isinstance(value, Tensor) or torch.equal(value, there[part]), part
    assert blocks.bytes == 4 * ExpertBlocks.of([(range(1), prepare(other))], torch.device("cpu")).bytes
    with pytest.raises(ValueError, match=r"\(2, .* is no expert of \(4, "):
        blocks.put(0, prepare(random_experts(kind, 2, 3)))
    with pytest.raises(ValueError, match="gate_up is Bf16Matrix, the layer's experts have"):
        blocks.put(0, random_experts(Bf16Matrix, 1, 3))


def test_captured_experts_run_what_took_their_place() -> None:
    kernels = select_kernels("cpu", 1)
    weights, other = random_experts(Int4Matrix, 4, 1), random_experts(Int4Matrix, 1, 2)
    expected = with_expert(weights, 3, other)
    blocks = ExpertBlocks.of([(range(4), weights)], torch.device("cpu"))
    x = kernels.quantize(torch.randn(2, 96, generator=torch.Generator().manual_seed(3)), ActivationFormat.INT8)
    pairs = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([3, 0, 3], dtype=torch.int32)
    graph = kernels.capture(lambda: blocks.run(kernels, x, *pairs))
    blocks.put(3, other)
    graph.replay()
    assert torch.equal(graph.result, kernels.experts(x, *pairs, expected))


def test_experts_of_several_kinds_stay(folders: SimpleNamespace) -> None:
    formats = [cycle(*FORMATS)(LAYER, expert) for expert in range(EXPERTS)]
    blocks = reader(folders.mixed).read(LAYER, range(EXPERTS), formats)
    with pytest.raises(ValueError, match="experts of 2 kinds of matrix cannot take each other's place"):
        blocks.put(0, blocks.blocks[0])
