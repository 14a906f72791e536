"""Shards with tensor-parallel attention, in this process: the bits of one shard that is alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zmq
from decode_rows import decodes
from tiny_checkpoint import write_tiny

from flyray.actors import shard as shard_module
from flyray.actors import step_answer
from flyray.actors.engine_config import EngineConfig
from flyray.actors.engine_shape import EngineShape
from flyray.actors.link import LinkPlace, Links
from flyray.actors.sequence import COLOCATED
from flyray.actors.shard import Shard
from flyray.actors.shard_group import HELLO
from flyray.actors.shard_start import ShardStart
from flyray.actors.socket_folder import SocketFolder
from flyray.actors.stage_program import Attention
from flyray.actors.step_plan import NewTokens, Sampling, SequenceStart, Slice, StepPlan, StepResult
from flyray.actors.wire import decode_as, encode
from flyray.kernels.protocol import LinearWeight
from flyray.kernels.torch_kernels import TorchKernels

# Nothing here takes so long unless it hangs.
WAIT_MS = 60_000
GREEDY = Sampling(0.0, 1.0, 0, 0)
DRAWN = Sampling(0.9, 0.95, 50, 7, repetition_penalty=1.5, top_logprobs=2)
PROMPTS = {1: tuple(range(3, 20)), 2: (5,), 3: tuple((7 * place) % 251 for place in range(150))}
ROUNDED = {"int8_weights": ("attention", "shared"), "int4_weights": ("dense", "head")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


class Bench:
    """Running shards, and the router's end of their links."""

    def __init__(self, config: EngineConfig, micro_batches: int = 1) -> None:
        self.micro_batches = micro_batches
        self.folder, self.links = SocketFolder(), Links(None)
        place = LinkPlace(folder=self.folder.path)
        bound = [self.links.bind(zmq.DEALER, place, f"plan-{shard}") for shard in range(config.shards)]
        self.routers, self.shards = [socket for socket, _ in bound], [Shard() for _ in bound]
        self.shape = shape = EngineShape.read(config)
        self.starts = [
            ShardStart(
                engine="engine",
                epoch=4,
                shard=shard,
                model_path=config.model_path,
                precision=config.precision,
                weights=config.weights,
                int8_weights=config.int8_weights,
                int4_weights=config.int4_weights,
                backend=config.backend,
                kernel_plan=None,
                threads=1,
                placement=shape.placement,
                moves=False,
                tensor=shape.tensor,
                kv_pages=40,
                kv_memory_share=0.0,
                kv_dtype="auto",
                prompt_attention="absorbed",
                page_size=8,
                programs=shape.programs,
                plan_address=address,
                place=place,
                keys=None,
                timeout_s=WAIT_MS / 1000,
                silence_s=0.9,
            )
            for shard, (_, address) in enumerate(bound)
        ]
        addresses = [shard.open(start) for shard, start in zip(self.shards, self.starts, strict=True)]
        self.reports = [shard.start(addresses) for shard in self.shards]
        assert [result.step for result in self.receive()] == [HELLO] * config.shards

    def receive(self) -> list[StepResult]:
        assert all(router.poll(WAIT_MS) for router in self.routers), "a shard does not answer"
        return [decode_as(router.recv(), StepResult) for router in self.routers]

    def ask(self, plan: StepPlan) -> list[StepResult]:
        self.send(plan)
        return self.receive()

    def send(self, plan: StepPlan) -> None:
        """All shards get the same, or with data-parallel attention each its own sequences: n on shard n modulo them."""
        name = self.shape.programs[self.micro_batches - 1].name
        for shard, router in enumerate(self.routers):
            mine = replace(plan, program=name) if self.shape.tensor else self.own(replace(plan, program=name), shard)
            router.send(encode(mine))

    def own(self, plan: StepPlan, shard: int) -> StepPlan:
        shards = len(self.routers)
        starts = tuple(start for start in plan.starts if start.sequence % shards == shard)
        slices = tuple(part for part in plan.slices if part.sequence % shards == shard)
        rows = zip(plan.decodes.sequences, plan.decodes.starts, strict=True)
        mine = decodes(*(row for row in rows if row[0] % shards == shard))
        ends = tuple(s for s in plan.ends if s % shards == shard)
        return replace(plan, starts=starts, slices=slices, ends=ends, decodes=mine)

    def close(self) -> None:
        for shard in self.shards:
            shard.stop()
        self.links.close()
        self.folder.close()


def plans(keep: Path) -> list[StepPlan]:
    """Prompts, one of them scored and cut, then decode steps of changing rows, one of them timed."""
    first = StepPlan("engine", 4, 0, "", (), (), (), False)
    starts = (
        SequenceStart(1, GREEDY, False),
        SequenceStart(2, DRAWN, False, history=PROMPTS[2]),
        SequenceStart(3, GREEDY, True, keep=str(keep)),
    )
    long = PROMPTS[3]
    slices = (
        Slice(1, 0, PROMPTS[1], (0, 1, 2), True),
        Slice(2, 0, PROMPTS[2], (3,), True),
        Slice(3, 0, long[:140], tuple(range(4, 22)), False, long[140]),
    )
    steps = [replace(first, starts=starts, slices=slices)]
    last = Slice(3, 140, long[140:], (22,), True)
    steps.append(replace(first, decodes=decodes((1, 17), (2, 1)), slices=(last,)))
    steps.append(replace(first, decodes=decodes((1, 18), (2, 2)), trace=True))
    steps += [replace(first, decodes=decodes((1, at))) for at in (19, 20)]
    steps.append(replace(first, ends=(1, 2, 3)))
    return [replace(plan, step=step) for step, plan in enumerate(steps)]


def run(bench: Bench, keep: Path) -> list[list[StepResult]]:
    try:
        return [bench.ask(plan) for plan in plans(keep)]
    finally:
        bench.close()


def rows_of(result: StepResult) -> list[tuple[int, int, float]]:
    return list(zip(result.tokens.sequences, result.tokens.tokens, result.tokens.logprobs, strict=True))


def told(results: Sequence[StepResult]) -> tuple[object, object]:
    return results[0].tokens, results[0].scores


@pytest.mark.parametrize(("precision", "rounded"), [("w4a8", ROUNDED), ("w8a8", {}), ("w4a16", {})])
def test_shards_give_the_bits_of_one(
    precision: str, rounded: dict[str, tuple[str, ...]], checkpoint: Path, tmp_path: Path
) -> None:
    config = EngineConfig(str(checkpoint), precision=precision, **rounded)
    expected = run(Bench(config), tmp_path / "one")
    for shards, redundant in ((2, 0), (3, 2)):  # experts on several shards, of which one runs each pair
        several_shards = replace(config, shards=shards, attention="tensor_parallel", redundant_experts=redundant)
        bench = Bench(several_shards)
        assert bench.shape.placement.sizes == ((4, 4) if shards == 2 else (5, 5, 4))
        assert bench.shape.program.name == "tensor_parallel-1"
        found = run(bench, tmp_path / f"{shards}")
        for one, several in zip(expected, found, strict=True):
            assert [result.error for result in several] == [""] * shards
            assert told(several) == told(one)
            assert all((result.tokens, result.scores) == (NewTokens(), ()) for result in several[1:])
            if one[0].stages:
                names = [stage.name for stage in bench.shape.program.stages[COLOCATED]]
                assert all([stage.name for stage in result.stages] == names for result in several)
        assert [shard.stats().sequences for shard in bench.shards] == [0] * shards
        assert [shard.stats().dropped for shard in bench.shards] == [0] * shards
        assert (tmp_path / f"{shards}").read_bytes() == (tmp_path / "one").read_bytes()
    assert sum(len(results[0].tokens.tokens) for results in expected) == 2 + 3 + 2 + 1 + 1


@pytest.mark.parametrize(("attention", "shards"), [("data_parallel", 2), ("data_parallel", 3), ("tensor_parallel", 2)])
def test_micro_batches_give_the_bits_of_one(
    attention: Attention, shards: int, checkpoint: Path, tmp_path: Path
) -> None:
    """On shards with no sequence, one, or several."""
    config = EngineConfig(str(checkpoint), precision="w4a8")
    expected = run(Bench(config), tmp_path / "one")
    bench = Bench(replace(config, shards=shards, attention=attention), 2)
    assert [program.micro_batches for program in bench.shape.programs] == [1, 2]
    found = run(bench, tmp_path / "two")
    for one, several in zip(expected, found, strict=True):
        assert [result.error for result in several] == [""] * shards
        assert sorted(row for result in several for row in rows_of(result)) == rows_of(one[0])
        assert [scores for result in several for scores in result.scores] == list(one[0].scores)
        if one[0].stages:
            # The timed step runs the first two sequences: on one shard both, or one on each of two.
            ran = {stage.name.rpartition(".")[2] for result in several for stage in result.stages}
            assert ran == {"0", "1"}
            if attention == "tensor_parallel":
                names = [stage.name for stage in bench.shape.programs[1].stages[COLOCATED]]
                assert [[stage.name for stage in result.stages] for result in several] == [names] * shards
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


class LateEvent:
    """A device that is done when it was asked twice, or waited for."""

    def record(self) -> None:
        self.left = 2

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0

    def synchronize(self) -> None:
        self.left = 0


def test_steps_of_devices_are_begun_before_those_before_them_are_done(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded, from tokens that every shard has drawn for itself."""
    monkeypatch.setattr(shard_module, "select_kernels", lambda *_: TorchKernels(torch.device("cpu")))
    monkeypatch.setattr(step_answer, "device_event", lambda _: LateEvent())
    starts = tuple(SequenceStart(number, GREEDY, False) for number in (1, 2))
    slices = (Slice(1, 0, PROMPTS[1], (0, 1, 2), True), Slice(2, 0, PROMPTS[2], (3,), True))
    first = StepPlan("engine", 4, 0, "", (), starts, slices, False)
    steps = [first]
    for step in range(1, 6):
        rows = decodes((1, 16 + step), (2, step))
        steps.append(replace(first, step=step, starts=(), slices=(), decodes=rows, decode_rows=2))
    config = EngineConfig(str(checkpoint), precision="w4a8")
    found = []
    for changed in (config, replace(config, shards=3, attention="tensor_parallel")):
        bench = Bench(changed)
        try:
            told = [bench.ask(steps[0])]
            for pair in (steps[1:3], steps[3:5], steps[5:]):
                for plan in pair:
                    bench.send(plan)
                told += [bench.receive() for _ in pair]
        finally:
            bench.close()
        assert [[result.error for result in each] for each in told] == [[""] * changed.shards] * 6
        found.append([each[0].tokens for each in told])
    assert found[0] == found[1]
    assert sum(len(tokens.tokens) for tokens in found[0]) == 12


def test_a_shard_holds_its_slice_and_all_pages(checkpoint: Path) -> None:
    config = EngineConfig(str(checkpoint), precision="w4a8", shards=3, attention="tensor_parallel")
    bench = Bench(config)
    try:
        heads = [len(shard._stages.weights.layers[0].attention.w_uk) for shard in bench.shards]
        tokens = [rows(shard._stages.weights.head) for shard in bench.shards]
        assert (heads, tokens) == ([2, 1, 1], [86, 85, 85])
        assert [report.kv_pages for report in bench.reports] == [40] * 3
    finally:
        bench.close()


def rows(weight: LinearWeight) -> int:
    assert isinstance(weight, torch.Tensor)
    return len(weight)


def test_one_shard_has_nothing_to_divide(checkpoint: Path) -> None:
    shape = EngineShape.read(EngineConfig(str(checkpoint), precision="w4a8", attention="tensor_parallel"))
    assert (shape.program.name, shape.tensor) == ("colocated-1", ())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shards": 5}, "attention: 'tensor_parallel' gives each of 5 shards a head at least, the model has 4"),
        ({"attention": "expert"}, "attention: 'expert' is none of data_parallel, tensor_parallel"),
        ({"statistics": "/statistics"}, "statistics: with attention 'tensor_parallel' none are gathered"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], text: str, checkpoint: Path) -> None:
    values = {"precision": "w4a8", "attention": "tensor_parallel", **changes}
    with pytest.raises(ValueError, match=text):
        EngineShape.read(EngineConfig(str(checkpoint), **values))  # pyright: ignore[reportArgumentType]
