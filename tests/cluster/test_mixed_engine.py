"""Engines on checkpoints of several formats: the same bits for any number of shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from mixed_checkpoint import cycle, dense_tensors, int8_linears, write_mixed
from tiny_engine import Answer, answers, greedy, run, tiny_config

from flyray.actors.model.single import SingleProcessModel
from flyray.cluster.engine import Engine, EngineClient
from flyray.kernels.select import select_kernels

LENGTHS = (5, 17, 40)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = dense_tensors(0)
    folder = tmp_path_factory.mktemp("mixed")
    return write_mixed(folder, dense, cycle("w8a8", "w4a8", "w4a8-channel"), int8_linears(dense), "language_model.")


def ask(path: Path, shards: int) -> dict[str, Answer]:
    async def all_of_them(engine: Engine) -> dict[str, Answer]:
        async with EngineClient(engine.address, engine.keys) as client:
            return await answers(client, [greedy(str(length), length, score=True) for length in LENGTHS])

    with Engine(tiny_config(path, precision="auto", shards=shards)) as engine:
        if shards == 2:
            plan = "\n".join(engine.precision_plan)
            assert "routed experts gate/up, 5 of 16" in plan
            assert "INT8 per token" in plan
            checks = {line.split(":")[0] for report in engine.router.reports for line in report.checks}
            assert {"cpu.experts[Int4Matrix]", "cpu.experts[Int8Matrix]", "cpu.linear[Int8Weight]"} <= checks
        return run(all_of_them(engine))


def test_answers_are_equal_for_any_shards_and_those_of_one_process(checkpoint: Path) -> None:
    found = {shards: ask(checkpoint, shards) for shards in (1, 2, 3)}
    assert {each.finish for each in found[1].values()} == {"length"}
    assert found[1] == found[2] == found[3]
    model = SingleProcessModel.load(checkpoint, "auto", select_kernels("cpu", 1), 64)
    for length in LENGTHS:
        request = greedy(str(length), length)
        assert found[1][str(length)].tokens == tuple(model.generate(request.prompt, request.max_tokens))
