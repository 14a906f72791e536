"""Statistics folders: what was written is read, whole, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from deepseek_oracle import QUANTIZATION, WRITERS, published_tensors, random_model, save_checkpoint, small_text
from gathered import write_statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_checkpoint import write_tiny

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.engine_config import expert_ranges
from flyray.actors.model.config import ModelConfig
from flyray.actors.statistics import LayerStatistics, Statistics, StatisticsError, StatisticsPlan, fingerprint
from flyray.actors.statistics_writer import ShardStatistics, StatisticsFolder

FIELDS = ("count", "input_absmax", "input_energy", "inner_absmax", "inner_energy", "input_moments")
PLAN = StatisticsPlan("f" * 64, "w4a8", (1, 2), (range(3), range(3, 8)), 3, 64, 32, 16)


@st.composite
def plans(draw: st.DrawFn) -> StatisticsPlan:
    experts = draw(st.integers(1, 9))
    block = draw(st.sampled_from((0, 1, 4, 8)))
    return StatisticsPlan(
        fingerprint=draw(st.text(max_size=5)),
        precision=draw(st.sampled_from(("bf16", "mixed"))),
        layers=tuple(sorted(draw(st.sets(st.integers(0, 999), min_size=1, max_size=3)))),
        experts=expert_ranges(experts, draw(st.integers(1, experts))),
        top_k=draw(st.integers(1, experts)),
        hidden_size=8 * draw(st.integers(1, 4)),
        inner_size=8 * draw(st.integers(1, 3)),
        moments_block=block,
    )


@pytest.fixture
def gathered(tmp_path: Path) -> Path:
    return write_statistics(tmp_path / "gathered", PLAN, 20)


def same(found: LayerStatistics, expected: LayerStatistics) -> bool:
    pairs = [(getattr(found, name), getattr(expected, name)) for name in FIELDS]
    pairs += [(found.inner_moments(expert), expected.inner_moments(expert)) for expert in range(len(found.count))]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@settings(max_examples=12, deadline=None)
@given(plan=plans(), tokens=st.integers(0, 6), seed=st.integers(0, 9))
def test_what_was_written_is_read(
    plan: StatisticsPlan, tokens: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_statistics(tmp_path_factory.mktemp("gathered") / "new", plan, tokens, seed)
    found = Statistics.open(path)
    assert (found.plan, found.tokens, found.layers, found.precision) == (plan, tokens, plan.layers, plan.precision)
    for layer in plan.layers:
        files = [load_file(path / plan.file(layer, shard)) for shard in range(len(plan.experts))]
        read = found.layer(layer)
        for name in FIELDS[:-1]:
            assert torch.equal(getattr(read, name), torch.cat([file[name] for file in files]).to(getattr(read, name)))
        if plan.moments_block:
            assert torch.equal(read.input_moments, sum(file["input_moments"] for file in files).float())
            inner = torch.cat([file["inner_moments"] for file in files]).float()
            assert all(torch.equal(read.inner_moments(expert), each) for expert, each in enumerate(inner))
        assert torch.equal(read.count, found.counts(layer))
        assert int(read.count.sum()) == tokens * plan.top_k


@settings(max_examples=6, deadline=None)
@given(plan=plans(), seed=st.integers(0, 9))
def test_shards_together_are_one_shard(
    plan: StatisticsPlan, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("gathered")
    alone = replace(plan, experts=(range(plan.num_experts),))
    one = Statistics.open(write_statistics(folder / "one", alone, 5, seed))
    many = Statistics.open(write_statistics(folder / "many", plan, 5, seed))
    assert one.unreached == many.unreached
    for layer in plan.layers:
        found, expected = many.layer(layer), one.layer(layer)
        if plan.moments_block:
            torch.testing.assert_close(found.input_moments, expected.input_moments, rtol=1e-6, atol=1e-6)
        assert same(replace(found, input_moments=None), replace(expected, input_moments=None))


def test_experts_never_reached_are_named(tmp_path: Path) -> None:
    plan = replace(PLAN, experts=(range(4), range(4, 9)), top_k=1, moments_block=0)
    found = Statistics.open(write_statistics(tmp_path / "few", plan, 2))
    for layer in plan.layers:
        missing = [expert for expert in range(9) if found.counts(layer)[expert] == 0]
        assert len(missing) >= 7
        assert [expert for at, expert in found.unreached if at == layer] == missing
    assert found.layer(1).input_moments is None
    assert found.layer(1).inner_moments(8) is None
    with pytest.raises(IndexError, match=r"expert 9: layer 1 has experts 0\.\.8"):
        found.layer(1).inner_moments(9)


def test_until_completed_they_are_refused(tmp_path: Path) -> None:
    folder = StatisticsFolder(tmp_path, PLAN)
    ShardStatistics(tmp_path, PLAN, 0).flush()
    with pytest.raises(StatisticsError, match=r"statistics\.json: incomplete; stop the engine"):
        Statistics.open(tmp_path)
    with pytest.raises(StatisticsError, match="another engine gathers there; name another folder"):
        StatisticsFolder(tmp_path, PLAN)
    folder.close()  # as the end of a killed process does
    second = StatisticsFolder(tmp_path, replace(PLAN, layers=(1,)))
    assert not list(tmp_path.glob("layer-*"))
    for shard in range(2):
        ShardStatistics(tmp_path, PLAN, shard).flush()
    second.complete(0)
    assert Statistics.open(tmp_path).layers == (1,)
    with pytest.raises(StatisticsError, match="complete statistics are there; name another folder, or remove it"):
        StatisticsFolder(tmp_path, PLAN)


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StatisticsError, match=r"holds notes\.txt, which is no statistics file"):
        StatisticsFolder(tmp_path, PLAN)
    with pytest.raises(StatisticsError, match=r"notes\.txt: cannot take statistics"):
        StatisticsFolder(tmp_path / "notes.txt", PLAN)


def _truncate(path: Path) -> None:
    with (path / PLAN.file(2, 1)).open("r+b") as stream:
        stream.truncate(2000)


def _recount(path: Path) -> None:
    ShardStatistics(path, PLAN, 0).flush()


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "statistics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_truncate, r"layer-002-shard-001-of-002\.safetensors: truncated: .*; remove the folder and gather them again"),
        (lambda path: (path / PLAN.file(1, 0)).unlink(), r"layer-001-shard-000-of-002\.safetensors: cannot be read"),
        (_recount, r"layer-001-shard-000-of-002\.safetensors: the layer's experts had \d+ tokens, statistics\.json"),
        (_edit(version=7), r"statistics\.json: version 7, this flyray reads 1"),
        (_edit(complete="yes"), r"statistics\.json: has no field 'complete'"),
        (_edit(tokens=19), "says 57"),
        (
            _edit(hidden_size=128),
            r"input_energy is torch\.float64 \[3, 64\], expected torch\.float64 \[3, 128\]",
        ),
        (_edit(experts=[[0, 3], [4, 8]]), "ranges that follow each other from 0"),
        (_edit(layers=None), "TypeError"),
        (lambda path: (path / "statistics.json").write_text("{"), r"statistics\.json: is not JSON"),
        (lambda path: (path / "statistics.json").unlink(), "is not there; name a folder that `flyray calibrate`"),
    ],
)
def test_damage_is_named(gathered: Path, damage: Callable[[Path], None], named: str) -> None:
    damage(gathered)
    with pytest.raises(StatisticsError, match=named):
        Statistics.open(gathered)


def test_a_full_disk_is_named_when_the_files_are_made() -> None:
    # A file system in memory refuses such a size at once; others might fill the disk before.
    huge = replace(PLAN, layers=(1,), hidden_size=1 << 45, moments_block=0)
    with (
        TemporaryDirectory(dir="/dev/shm", prefix="flyray-test-") as folder,
        pytest.raises(StatisticsError, match=r"layer-001-.*-002\.safetensors: \d+ bytes cannot be reserved"),
    ):
        ShardStatistics(Path(folder), huge, 0)


def test_they_belong_to_a_model_in_any_format(tmp_path: Path) -> None:
    text = small_text()
    model = random_model(text, 0)
    checkpoints = {}
    for name, writer in WRITERS.items():
        prefix = "language_model." if name == "w4a16" else ""
        tensors = published_tensors(model, writer)
        checkpoints[name] = Checkpoint(save_checkpoint(tmp_path / name, text, tensors, QUANTIZATION[name], prefix))
    assert len({fingerprint(each) for each in checkpoints.values()}) == 1
    native = checkpoints["w4a16"]
    plan = StatisticsPlan.of(native, ModelConfig.from_dict(native.config), expert_ranges(8, 2), "w4a16", 0)
    found = Statistics.open(write_statistics(tmp_path / "gathered", plan, 4))
    for checkpoint in checkpoints.values():
        found.check(checkpoint)
    with pytest.raises(StatisticsError, match=r"gathered on another model than .*tiny; calibrate that one"):
        found.check(Checkpoint(write_tiny(tmp_path / "tiny")))


@pytest.mark.parametrize(("block", "named"), [(48, "hidden_size 64"), (0, ""), (16, ""), (64, "")])
def test_blocks_must_divide_the_models_sizes(tmp_path: Path, block: int, named: str) -> None:
    checkpoint = Checkpoint(write_tiny(tmp_path))
    model = ModelConfig.from_dict(checkpoint.config)
    if named:
        with pytest.raises(ValueError, match=f"moments_block: {block} does not divide {named}"):
            StatisticsPlan.of(checkpoint, model, expert_ranges(8, 1), "w4a8", block)
    else:
        assert StatisticsPlan.of(checkpoint, model, expert_ranges(8, 1), "w4a8", block).moments_block == block
