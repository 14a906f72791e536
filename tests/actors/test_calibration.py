"""What a running shard gathers, against hooks in transformers' model and the quantization written down once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_oracle import (
    QUANTIZATION,
    WRITERS,
    native_values,
    published_tensors,
    random_model,
    save_checkpoint,
    small_text,
)
from emulation import DIRECT, EmulatedExperts
from mixed_checkpoint import cycle, dense_tensors, write_mixed
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from flyray.actors.calibration import Collector
from flyray.actors.checkpoint import Checkpoint
from flyray.actors.exchange import LocalExchange, Received
from flyray.actors.interpreter import Interpreter
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.kv_pages import KvPages
from flyray.actors.model.stages import ModelStages
from flyray.actors.request import Generate
from flyray.actors.scheduler import Scheduler
from flyray.actors.scheduler_config import SchedulerConfig
from flyray.actors.sequence import COLOCATED, sequence
from flyray.actors.sequence_table import SequenceTable
from flyray.actors.stage_actions import DataParallelActions
from flyray.actors.statistics import Statistics, StatisticsPlan
from flyray.actors.statistics_writer import ShardStatistics, StatisticsFolder
from flyray.actors.step_plan import Sampling, StepResult
from flyray.actors.weights import load_shard
from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.select import CPU_BACKENDS, select_kernels

TEXT = small_text(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
PROMPTS = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 7, 33, 50)]
GREEDY = Sampling(0.0, 1.0, 0, 0)
BLOCK = 16


def gather(
    path: Path, folder: Path, precision: str = "auto", chunk: int = 512, block: int = BLOCK, backend: str = "cpu"
) -> Statistics:
    """Scores the prompts in one shard, `chunk` tokens a step."""
    checkpoint = Checkpoint(path)
    # Float sums of the variant "amx" are bound by 1e-4 alone (its own tests), too wide to tell a wrong statistic.
    kernels = CpuKernels(1, "portable") if backend == "cpu" else select_kernels(backend, 1)
    model = ModelConfig.from_dict(checkpoint.config)
    weights = load_shard(checkpoint, model, precision, range(model.n_routed_experts), kernels)
    stages = ModelStages(model, weights, kernels, KvPages.allocate(model, 64, 8, kernels))
    program = sequence(model, COLOCATED, 1)
    interpreter = Interpreter(DataParallelActions(stages, kernels, LocalExchange()), program)
    plan = StatisticsPlan.of(checkpoint, model, (range(model.n_routed_experts),), precision, block)
    target = StatisticsFolder(folder, plan)
    interpreter.collector = Collector(ShardStatistics(folder, plan, 0), kernels)
    limits = (model.max_position_embeddings, model.vocab_size, program.name)
    scheduler, table = Scheduler(SchedulerConfig("engine", 0, 1, 64, 8, chunk, 8, *limits)), SequenceTable(64, 8)
    for number, prompt in enumerate(PROMPTS):
        assert scheduler.add(Generate(str(number), tuple(prompt), 0, GREEDY, (), 0, True)) is None
    while plans := scheduler.schedule():
        batch = table.apply(plans[0])
        answer = interpreter.run(plans[0].step, batch, None)
        scheduler.complete([StepResult("engine", 0, plans[0].step, 0, answer.tokens, answer.scores, (), "")])
    target.complete(interpreter.collector.finish())
    return Statistics.open(folder)


@dataclass
class Seen:
    """What came to each expert of a layer: rows [n, D] and the inputs of its down_proj [n, I], float64."""

    inputs: dict[int, list[Tensor]] = field(default_factory=dict)
    inner: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, expert: int, row: Tensor, inner: Tensor) -> None:
        self.inputs.setdefault(expert, []).append(row.double())
        self.inner.setdefault(expert, []).append(inner.double())


def plain_pair(experts: Any, row: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
    return row, torch.nn.functional.silu(gate) * up


def watch(model: DeepseekV3ForCausalLM) -> dict[int, Seen]:
    """Runs the prompts through transformers' model and notes what its routed experts get."""
    seen: dict[int, Seen] = {}
    hooks = []
    for number in range(model.config.first_k_dense_replace, model.config.num_hidden_layers):

        def note(module: Any, args: tuple[Tensor, Tensor, Tensor], number: int = number) -> None:
            hidden, ids = args[0].flatten(0, -2), args[1]
            for row, chosen in zip(hidden, ids.tolist(), strict=True):
                for expert in chosen:
                    seen.setdefault(number, Seen()).add(expert, *plain_pair(module, row, expert))

        hooks.append(model.model.layers[number].mlp.experts.register_forward_pre_hook(note))
    with torch.no_grad():
        for prompt in PROMPTS:
            model(torch.tensor([prompt]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def close(found: Tensor | None, expected: Tensor, bound: float = 1e-5) -> None:
    assert found is not None
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())


def blocks_of(rows: Tensor, block: int) -> Tensor:
    cut = rows.unflatten(1, (-1, block))
    return torch.einsum("nbi,nbj->bij", cut, cut)


def check(found: Statistics, seen: dict[int, Seen], tokens: int) -> None:
    assert found.tokens == tokens
    assert found.layers == tuple(seen)
    for layer, expected in seen.items():
        statistics = found.layer(layer)
        for expert in range(8):
            rows = expected.inputs.get(expert)
            assert int(statistics.count[expert]) == len(rows or ())
            if rows is None:
                assert (layer, expert) in found.unreached
                for name in ("input_absmax", "input_energy", "inner_absmax", "inner_energy"):
                    assert not bool(getattr(statistics, name)[expert].any())
                continue
            inputs, inner = torch.stack(rows), torch.stack(expected.inner[expert])
            close(statistics.input_absmax[expert], inputs.abs().amax(0))
            close(statistics.input_energy[expert], inputs.square().sum(0))
            close(statistics.inner_absmax[expert], inner.abs().amax(0))
            close(statistics.inner_energy[expert], inner.square().sum(0))
            if found.plan.moments_block:
                close(statistics.inner_moments(expert), blocks_of(inner, found.plan.moments_block))
        if found.plan.moments_block:
            every = torch.cat([torch.stack(rows) for rows in expected.inputs.values()])
            close(statistics.input_moments, blocks_of(every, found.plan.moments_block))


@pytest.mark.parametrize(("disk", "block"), [("bf16", BLOCK), ("w4a16", 64), ("bf16", 0)])
def test_they_are_those_of_hooks_in_transformers(disk: str, block: int, tmp_path: Path) -> None:
    model = random_model(TEXT, 21)
    if disk == "w4a16":
        with torch.no_grad():
            native_values(model)
    save_checkpoint(tmp_path / "model", TEXT, published_tensors(model, WRITERS[disk]), QUANTIZATION[disk])
    check(gather(tmp_path / "model", tmp_path / "gathered", block=block), watch(model), sum(map(len, PROMPTS)))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("formats", [("w4a8",), ("w8a8",), ("w4a8-channel",), ("w8a8-fp8",), ("w4a8", "w8a8")])
def test_of_quantized_experts_they_are_those_of_the_quantized_weights(
    formats: Sequence[str], backend: str, tmp_path: Path
) -> None:
    """One layer, so that no rounding of the layers before can fall the other way."""
    source, chosen = random_model(TEXT, 21), cycle(*formats)
    write_mixed(tmp_path / "model", dense_tensors(21, TEXT), chosen, text=TEXT)
    checkpoint, kernels = Checkpoint(tmp_path / "model"), select_kernels(backend, 1)
    model = ModelConfig.from_dict(checkpoint.config)
    stages = ModelStages(
        model, load_shard(checkpoint, model, "auto", range(8), kernels), kernels, KvPages.allocate(model, 1, 1, kernels)
    )
    plan = StatisticsPlan.of(checkpoint, model, (range(8),), "auto", BLOCK)
    folder = StatisticsFolder(tmp_path / "gathered", plan)
    collector = Collector(ShardStatistics(folder.path, plan, 0), kernels)
    seen = {}
    for layer in plan.layers:
        recipes = [DIRECT[chosen(layer, expert)] for expert in range(8)]
        emulated = EmulatedExperts(source.model.layers[layer].mlp.experts, recipes)
        for seed in range(3):
            routing = stages.gate(layer, torch.randn(30, 64, generator=torch.Generator().manual_seed(seed)))
            rows, ids = torch.arange(30, dtype=torch.int32).repeat_interleave(3), routing.ids.flatten()
            collector.add(layer, Received(routing.activations, rows, ids, (90,)), stages.experts_of(layer))
            sent, scale = routing.activations.values.double(), routing.activations.scale
            assert scale is not None
            for row, expert in zip((sent * scale.double()[:, None])[rows], ids.tolist(), strict=True):
                gate, up = emulated.gate[expert] @ row, emulated.up[expert] @ row
                seen.setdefault(layer, Seen()).add(expert, row, torch.nn.functional.silu(gate) * up)
    collector.finish()
    folder.complete(90)
    check(Statistics.open(folder.path), seen, 90)


def test_chunks_of_prompts_change_nothing(tmp_path: Path) -> None:
    model = random_model(TEXT, 3)
    path = save_checkpoint(tmp_path / "model", TEXT, published_tensors(model, WRITERS["w8a8"]), QUANTIZATION["w8a8"])
    whole, cut = (gather(path, tmp_path / str(chunk), chunk=chunk) for chunk in (512, 6))
    for layer in whole.layers:
        a, b = (load_file(each.path / each.plan.file(layer, 0)) for each in (whole, cut))
        for name in ("count", "input_absmax", "inner_absmax"):
            assert torch.equal(a[name], b[name])
        for name in ("input_energy", "inner_energy", "input_moments", "inner_moments"):
            assert a[name].dtype == torch.float64
            close(a[name], b[name], 1e-12)


def test_without_moments_none_are_written(tmp_path: Path) -> None:
    model = random_model(TEXT, 3)
    path = save_checkpoint(tmp_path / "model", TEXT, published_tensors(model, WRITERS["bf16"]), QUANTIZATION["bf16"])
    found = gather(path, tmp_path / "gathered", block=0)
    layer = found.layer(1)
    assert layer.input_moments is None
    assert layer.inner_moments(0) is None
    assert "input_moments" not in load_file(found.path / found.plan.file(1, 0))
