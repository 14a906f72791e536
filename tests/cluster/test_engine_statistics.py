"""Engines that gather statistics: the same for any shards, complete when they stop, and only then."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import write_tiny
from tiny_engine import answers, greedy, run, tiny_config

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.engine_config import EngineConfig
from flyray.actors.statistics import Statistics, StatisticsError
from flyray.cluster.engine import Engine, EngineClient, EngineError

pytestmark = pytest.mark.usefixtures("local_cluster")

LENGTHS = (1, 8, 21, 40)
NEW = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


async def ask(engine: Engine) -> None:
    async with EngineClient(engine.address, engine.keys) as client:
        found = await answers(client, [greedy(f"of {length}", length, NEW) for length in LENGTHS])
        assert {answer.finish for answer in found.values()} == {"length"}


def gathered(config: EngineConfig) -> Statistics:
    with Engine(config) as engine:
        run(ask(engine))
        with pytest.raises(StatisticsError, match="incomplete; stop the engine that gathers them"):
            Statistics.open(config.statistics)
    return Statistics.open(config.statistics)


def whole(found: Statistics, layer: int) -> dict[str, torch.Tensor]:
    """All tensors of a layer in float64, shards joined."""
    files = [load_file(found.path / found.plan.file(layer, shard)) for shard in range(len(found.plan.experts))]
    moments = torch.stack([file.pop("input_moments") for file in files]).sum(0)
    return {"input_moments": moments} | {name: torch.cat([file[name] for file in files]) for name in files[0]}


def test_any_shards_and_chunks_gather_the_same(checkpoint: Path, tmp_path: Path) -> None:
    config = tiny_config(checkpoint, statistics=str(tmp_path / "one"), moments_block=32)
    one = gathered(config)
    three = gathered(replace(config, statistics=str(tmp_path / "three"), shards=3, max_batch_tokens=7))
    # The last token of an answer is not run.
    assert one.tokens == three.tokens == sum(LENGTHS) + len(LENGTHS) * (NEW - 1)
    assert [len(each.plan.experts) for each in (one, three)] == [1, 3]
    for layer in one.layers:
        expected, found = whole(one, layer), whole(three, layer)
        for name in ("count", "input_absmax", "inner_absmax"):
            assert torch.equal(found[name], expected[name])
        for name in ("input_energy", "inner_energy", "input_moments", "inner_moments"):
            torch.testing.assert_close(
                found[name], expected[name], rtol=1e-12, atol=1e-12 * float(expected[name].max())
            )
            assert float(expected[name].max()) > 0
    for each in (one, three):
        each.check(Checkpoint(checkpoint))
        assert each.precision == "w4a8"


def test_what_a_dead_shard_leaves_is_refused_and_gathered_anew(checkpoint: Path, tmp_path: Path) -> None:
    config = tiny_config(checkpoint, statistics=str(tmp_path / "gathered"), shards=2)
    with Engine(config) as engine:
        run(ask(engine))
        os.kill(engine.router.local_pids[1], signal.SIGKILL)
    with pytest.raises(StatisticsError, match=r"gathered/statistics\.json: incomplete; .* if it was killed, remove"):
        Statistics.open(config.statistics)
    assert gathered(replace(config, shards=1)).tokens > 0


def test_complete_statistics_are_not_added_to(checkpoint: Path, tmp_path: Path) -> None:
    config = tiny_config(checkpoint, statistics=str(tmp_path / "gathered"))
    with Engine(config) as engine:
        second = Engine(config)
        with pytest.raises(StatisticsError, match="another engine gathers there; name another folder"):
            second.start()
        with pytest.raises(EngineError, match=r"this engine gathers them in .*gathered, of its own experts"):
            engine.override_experts(1, [0], checkpoint)
    before = Statistics.open(config.statistics)
    assert before.tokens == 0  # the golden prompt is not counted
    assert len(before.unreached) == 2 * 8
    with pytest.raises(StatisticsError, match="complete statistics are there; name another folder, or remove it"):
        Engine(config).start()
    assert json.loads((tmp_path / "gathered" / "statistics.json").read_text())["complete"] is True


def test_settings_that_make_no_sense_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="statistics: 'here' is not an absolute path"):
        tiny_config(checkpoint, statistics="here")
    with pytest.raises(ValueError, match="moments_block: 32, but statistics names no folder"):
        tiny_config(checkpoint, moments_block=32)
    with pytest.raises(ValueError, match="moments_block: -1 is less than 0"):
        tiny_config(checkpoint, statistics=str(tmp_path), moments_block=-1)
    with pytest.raises(ValueError, match="moments_block: 48 does not divide hidden_size 64"):
        Engine(tiny_config(checkpoint, statistics=str(tmp_path), moments_block=48))
