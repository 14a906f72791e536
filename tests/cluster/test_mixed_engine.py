"""Engines on checkpoints of several formats, on disk or by overriding experts: the same bits for any shards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from deepseek_oracle import Tensors, save_checkpoint
from mixed_checkpoint import (
    TEXT,
    cycle,
    dense_tensors,
    int8_linears,
    mixed_quantization,
    mixed_tensors,
    write_mixed,
)
from standing import standing
from tiny_engine import Answer, answer, answers, greedy, run, tiny_config

from flyray.actors.model.single import SingleProcessModel
from flyray.cluster.engine import Engine, EngineClient, EngineError
from flyray.kernels.select import select_kernels

pytestmark = pytest.mark.usefixtures("local_cluster")

LENGTHS = (5, 17, 40)


@pytest.fixture(scope="module")
def dense() -> Tensors:
    return dense_tensors(0)


def ask(engine: Engine) -> dict[str, Answer]:
    async def all_of_them() -> dict[str, Answer]:
        async with EngineClient(engine.address, engine.keys) as client:
            return await answers(client, [greedy(str(length), length, score=True) for length in LENGTHS])

    found = run(all_of_them())
    assert {each.finish for each in found.values()} == {"length"}
    return found


def start_and_ask(path: Path, shards: int) -> dict[str, Answer]:
    with Engine(tiny_config(path, precision="auto", shards=shards)) as engine:
        return ask(engine)


def one_process(path: Path) -> dict[str, tuple[int, ...]]:
    """The same requests' tokens."""
    model = SingleProcessModel.load(path, "auto", select_kernels("cpu", 1), 64)
    return {str(length): tuple(model.generate(greedy("", length).prompt, 12)) for length in LENGTHS}


def test_answers_are_equal_for_any_shards_and_those_of_one_process(dense: Tensors, tmp_path: Path) -> None:
    formats = cycle("w8a8", "w4a8", "w4a8-channel")
    path = write_mixed(tmp_path, dense, formats, int8_linears(dense), "language_model.")
    found = {shards: start_and_ask(path, shards) for shards in (1, 3)}
    with Engine(tiny_config(path, precision="auto", shards=2)) as engine:
        found[2] = ask(engine)
        plan = "\n".join(engine.precision_plan)
        assert "routed experts gate/up, 5 of 16" in plan
        assert "INT8 per token" in plan
        checks = {line.split(":")[0] for report in engine.router.reports for line in report.checks}
        assert {"cpu.experts[Int4Matrix]", "cpu.experts[Int8Matrix]", "cpu.linear[Int8Weight]"} <= checks
    assert found[1] == found[2] == found[3]
    assert {name: each.tokens for name, each in found[1].items()} == one_process(path)


@pytest.fixture(scope="module")
def folders(dense: Tensors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in several formats."""
    folder = tmp_path_factory.mktemp("overrides")
    formats = ("w8a8", "w4a8-channel", "w4a8", "w8a8-fp8")
    return {format: write_mixed(folder / format, dense, cycle(format)) for format in formats}


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[Engine]:
    """Two shards, all experts in w8a8."""
    with Engine(tiny_config(folders["w8a8"], precision="auto", shards=2)) as engine:
        yield engine


def on_disk(path: Path, dense: Tensors, overridden: dict[int, tuple[Sequence[int], str]]) -> dict[str, Answer]:
    """What an engine answers on a checkpoint that is mixed in the same way."""

    def chosen(layer: int, expert: int) -> str:
        experts, format = overridden.get(layer, ((), ""))
        return format if expert in experts else "w8a8"

    return start_and_ask(write_mixed(path, dense, chosen), 1)


def test_an_override_is_a_checkpoint_mixed_on_disk(
    engine: Engine, folders: dict[str, Path], dense: Tensors, tmp_path: Path
) -> None:
    own = ask(engine)
    engine.override_experts(1, range(8), folders["w4a8-channel"])
    whole_layer = ask(engine)
    assert whole_layer == on_disk(tmp_path / "layer", dense, {1: (range(8), "w4a8-channel")})
    engine.override_experts(2, [6, 1, 3], str(folders["w4a8"]))
    assert ask(engine) == on_disk(tmp_path / "both", dense, {1: (range(8), "w4a8-channel"), 2: ((1, 3, 6), "w4a8")})
    engine.override_experts(1, range(8), folders["w8a8"])
    engine.override_experts(2, range(8), folders["w8a8"])
    assert ask(engine) == own
    engine.override_experts(2, [7], folders["w4a8"])  # one shard alone holds it
    assert ask(engine) == on_disk(tmp_path / "one", dense, {2: ((7,), "w4a8")})
    engine.clear_overrides()
    assert ask(engine) == own
    assert whole_layer != own


def test_while_a_request_runs_it_is_refused(engine: Engine, folders: dict[str, Path]) -> None:
    async def during() -> Answer:
        async with EngineClient(engine.address, engine.keys) as client:
            with standing(engine.router.local_pids[0]):
                waiting = asyncio.create_task(answer(client, greedy("long", 5, 40)))
                while not (await client.status()).running:
                    pass
                for change in (
                    lambda: engine.override_experts(1, [0], folders["w4a8"]),
                    lambda: engine.clear_overrides(),
                ):
                    with pytest.raises(EngineError, match=r"requests run \(1\) or wait \(0\); there must be none"):
                        await asyncio.to_thread(change)
            return await waiting

    async def alone() -> Answer:
        async with EngineClient(engine.address, engine.keys) as client:
            return await answer(client, greedy("long", 5, 40))

    assert run(during()) == run(alone())


def test_requests_that_come_while_it_reads_wait_and_see_the_new_experts(
    engine: Engine, folders: dict[str, Path]
) -> None:
    async def both() -> tuple[Answer, Answer]:
        async with EngineClient(engine.address, engine.keys) as client:
            with engine.router._running_loop().hold():
                waiting = asyncio.create_task(answer(client, greedy("early", 17)))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(waiting), 0.3)
            return await waiting, await answer(client, greedy("late", 17))

    early, late = run(both())
    assert early == late


def test_what_cannot_be_overridden_is_refused_and_the_engine_lives_on(
    engine: Engine, folders: dict[str, Path], dense: Tensors, tmp_path: Path
) -> None:
    own = ask(engine)
    linears: list[str] = []
    without = mixed_tensors(dense, cycle("w4a8"), linears)
    for kind in ("gate", "up", "down"):
        for name in [name for name in without if name.startswith(f"model.layers.1.mlp.experts.6.{kind}_proj")]:
            del without[name]
    lacking = save_checkpoint(tmp_path / "lacking", TEXT, without, mixed_quantization(dense, cycle("w4a8"), linears))
    wide = write_mixed(tmp_path / "wide", dense_tensors(1, TEXT | {"moe_intermediate_size": 128}), cycle("w8a8"))
    refusals = [
        (1, range(8), folders["w8a8-fp8"], r"expert 0 of layer 1 is w8a8-fp8, for activations in fp8.*take int8"),
        (1, [0, 6], lacking, r"shard 1: CheckpointError: .*model\.layers\.1\.mlp\.experts\.6\S+ is missing"),
        (1, [0], wide, r"experts\.0\.gate_proj\.weight has shape \[128, 64\], expected \[64, 64\]"),
        (1, [0], tmp_path / "nowhere", "nowhere: no such checkpoint folder"),
        (1, [8, 2], folders["w4a8"], r"experts \[8\]: layer 1 has 0\.\.7"),
        (1, [], folders["w4a8"], r"experts of none: layer 1 has 0\.\.7"),
        (0, [1], folders["w4a8"], "layer 0 has no routed experts"),
        (3, [1], folders["w4a8"], "layer 3 has no routed experts"),
    ]
    for layer, experts, path, message in refusals:
        with pytest.raises(EngineError, match=message):
            engine.override_experts(layer, experts, path)
        assert engine.error == ""
    assert ask(engine) == own
    engine.override_experts(1, [0], folders["w4a8"])
    assert ask(engine) != own
    engine.clear_overrides()
    assert ask(engine) == own


def test_before_it_is_started_it_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(EngineError, match="has not been started"):
        Engine(tiny_config(folders["w8a8"], precision="auto")).clear_overrides()
