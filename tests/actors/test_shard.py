"""One shard in this process, with the test as its router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zmq
from decode_rows import decodes
from tiny_checkpoint import TINY, write_tiny

from flyray.actors import shard, step_answer
from flyray.actors.engine_config import EngineConfig
from flyray.actors.engine_shape import EngineShape
from flyray.actors.expert_placement import LayerPlacement
from flyray.actors.link import LinkError, LinkPlace, Links
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.random_weights import random_shard
from flyray.actors.sequence import COLOCATED, sequence
from flyray.actors.shard import Shard
from flyray.actors.shard_group import HELLO
from flyray.actors.shard_start import ShardStart
from flyray.actors.socket_folder import SocketFolder
from flyray.actors.step_plan import NewTokens, Sampling, SequenceStart, Slice, StepPlan, StepResult
from flyray.actors.wire import decode_as, encode
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.select import select_kernels
from flyray.kernels.torch_kernels import TorchKernels

# Nothing here takes so long unless it hangs.
WAIT_MS = 60_000
PROMPT = (3, 14, 15, 92, 65)
GREEDY = Sampling(0.0, 1.0, 0, 0)
FIRST = StepPlan(
    "engine",
    4,
    0,
    "colocated-1",
    (),
    (SequenceStart(1, GREEDY, True),),
    (Slice(1, 0, PROMPT, (5,), True),),
    False,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


class Bench:
    """A running shard, and the router's end of its link."""

    def __init__(self, checkpoint: Path, weights: str = "checkpoint") -> None:
        self.folder = SocketFolder()
        place = LinkPlace(folder=self.folder.path)
        self.links = Links(None)
        self.router, address = self.links.bind(zmq.DEALER, place, "plan-0")
        self.shard = Shard()
        program = sequence(ModelConfig.from_dict(TINY), COLOCATED, 1)
        self.start = ShardStart(
            engine="engine",
            epoch=4,
            shard=0,
            model_path=str(checkpoint),
            precision="w4a8",
            weights=weights,
            int8_weights=(),
            int4_weights=(),
            backend="cpu",
            kernel_plan=None,
            threads=1,
            tensor=(),
            placement=LayerPlacement((tuple(range(8)),)),
            moves=False,
            kv_pages=16,
            kv_memory_share=0.0,
            kv_dtype="auto",
            prompt_attention="absorbed",
            page_size=8,
            programs=(program,),
            plan_address=address,
            place=place,
            keys=None,
            timeout_s=WAIT_MS / 1000,
            silence_s=0.9,
        )

    def run(self) -> Bench:
        self.shard.open(self.start)
        self.report = self.shard.start([""])
        assert self.receive().step == HELLO
        return self

    def receive(self) -> StepResult:
        assert self.router.poll(WAIT_MS), "the shard does not answer"
        return decode_as(self.router.recv(), StepResult)

    def ask(self, plan: StepPlan) -> StepResult:
        self.router.send(encode(plan))
        return self.receive()

    def close(self) -> None:
        self.shard.stop()
        self.links.close()
        self.folder.close()


@pytest.fixture
def bench(checkpoint: Path) -> Iterator[Bench]:
    bench = Bench(checkpoint)
    yield bench.run()
    bench.close()


def test_it_says_what_it_loaded_and_checked(bench: Bench) -> None:
    done, total = bench.shard.progress()
    assert done == total == bench.report.bytes_read > 100_000
    assert any(line.startswith("cpu.experts[Int4Matrix]: error 0 of 0") for line in bench.report.checks)


def test_it_continues_a_prompt_as_one_process_does(bench: Bench, checkpoint: Path) -> None:
    model = SingleProcessModel.load(checkpoint, "w4a8", select_kernels("cpu", 1), 32)
    logprobs = model.prefill(PROMPT).log_softmax(dim=-1)
    result = bench.ask(FIRST)
    tokens = [result.tokens.tokens[0]]
    assert result.error == ""
    assert result.scores[0].logprobs == tuple(float(logprobs[row, token]) for row, token in enumerate(PROMPT[1:]))
    assert result.tokens.logprobs[0] == pytest.approx(float(logprobs[-1].max()), abs=2e-6)
    for step in range(1, 5):
        row = 1, len(PROMPT) + step - 1, (6,) if step == 4 else ()
        result = bench.ask(replace(FIRST, step=step, starts=(), slices=(), decodes=decodes(row)))
        tokens.append(result.tokens.tokens[0])
        assert result.stages == ()
    assert tokens == model.generate(PROMPT, 5)
    stats = bench.shard.stats()
    assert (stats.steps, stats.sequences, stats.dropped, stats.error) == (5, 1, 0, "")


def test_random_weights_need_nothing_but_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    config, kernels = ModelConfig.from_dict(TINY), select_kernels("cpu", 1)
    model = SingleProcessModel(config, random_shard(config, "w4a8", range(8), kernels), kernels, 32)
    bench = Bench(tmp_path, "random")
    try:
        result = bench.run().ask(FIRST)
        assert [result.tokens.tokens[0]] == model.generate(PROMPT, 1)
        assert bench.report.bytes_read == 0
    finally:
        bench.close()
    engine = EngineConfig(str(tmp_path), precision="w4a8", weights="random")
    assert EngineShape.read(engine).model == config
    with pytest.raises(ValueError, match="precision: 'auto' is no format of random weights; bf16"):
        EngineShape.read(replace(engine, precision="auto"))
    with pytest.raises(ValueError, match="statistics: there is nothing to learn of random weights"):
        replace(engine, statistics=str(tmp_path))


class LateEvent:
    """A device that is done when it was asked three times, or waited for."""

    def record(self) -> None:
        self.left = 3

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0

    def synchronize(self) -> None:
        self.left = 0


def test_steps_of_a_device_are_begun_before_the_one_before_them_is_done(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "select_kernels", lambda *_: TorchKernels(torch.device("cpu")))
    monkeypatch.setattr(step_answer, "device_event", lambda _: LateEvent())
    bench = Bench(checkpoint).run()
    expected = SingleProcessModel.load(checkpoint, "w4a8", ReferenceKernels(), 32).generate(PROMPT, 6)
    tokens = [bench.ask(FIRST).tokens.tokens[0]]
    steps = [
        replace(
            FIRST,
            step=step,
            starts=(),
            decode_rows=1,
            slices=(),
            decodes=decodes((1, 4 + step, (6,) if step == 4 else ())),
        )
        for step in range(1, 6)
    ]
    for plans in (steps[:2], steps[2:4], [steps[4], replace(FIRST, step=6, starts=(), slices=(), ends=(1,))]):
        for plan in plans:
            bench.router.send(encode(plan))
        for plan in plans:
            result = bench.receive()
            assert (result.step, result.error) == (plan.step, "")
            tokens += result.tokens.tokens
    assert tokens == expected
    assert bench.shard.stats().sequences == 0
    bench.close()


def test_a_traced_step_has_the_programs_stages_in_order(bench: Bench) -> None:
    result = bench.ask(replace(FIRST, trace=True))
    assert [stage.name for stage in result.stages] == [
        stage.name for stage in bench.start.programs[0].stages[COLOCATED]
    ]


def test_plans_of_another_engine_or_epoch_are_dropped_and_counted(bench: Bench) -> None:
    for strange in (encode(replace(FIRST, epoch=3)), encode(replace(FIRST, engine="other")), b"\xc1", b""):
        bench.router.send(strange)
    assert bench.ask(FIRST).step == 0
    assert bench.shard.stats().dropped == 4


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (replace(FIRST, program="other-1"), "step 0: the plan names program 'other-1', this shard has 'colocated-1'"),
        (replace(FIRST, starts=()), "step 0: the plan runs sequence 1, which is not here"),
        (
            replace(FIRST, slices=(Slice(1, 0, (256,), (5,), True),)),
            "step 0: stages embed.0 to combine.2.0: take_rows: rows[0] is 256, expected 0 to 255",
        ),
    ],
)
def test_what_goes_wrong_in_a_step_is_its_result(bench: Bench, plan: StepPlan, named: str) -> None:
    result = bench.ask(plan)
    assert result.error.startswith(named)
    assert result.tokens == NewTokens()
    assert bench.shard.stats().error == result.error


def test_when_the_router_goes_the_loop_ends(bench: Bench) -> None:
    bench.ask(FIRST)
    bench.links.close()
    thread = bench.shard._thread
    assert thread is not None
    thread.join(WAIT_MS / 1000)
    assert bench.shard.stats().error == "the router is gone"


def test_it_may_be_stopped_at_any_time(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    bench.shard.open(bench.start)
    bench.shard.stop()
    with pytest.raises(LinkError, match="shard 0 was stopped while it started"):
        bench.shard.start([""])
    bench.close()
