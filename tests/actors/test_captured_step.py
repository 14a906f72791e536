"""Decode steps that are captured and replayed: the bits of the same steps run stage by stage."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
from decode_rows import decodes
from pretend_device import pretend_device
from tiny_checkpoint import write_tiny
from torch import Tensor

from flyray.actors import captured_step
from flyray.actors.checkpoint import Checkpoint
from flyray.actors.exchange import Exchange, ExchangePoint, LocalExchange, Received, Sent
from flyray.actors.interpreter import Interpreter, StageError
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.kv_pages import KvPages
from flyray.actors.model.layer_weights import ShardWeights
from flyray.actors.model.stages import ModelStages
from flyray.actors.sequence import sequence
from flyray.actors.sequence_table import SequenceTable
from flyray.actors.stage_actions import DataParallelActions
from flyray.actors.step_plan import NewTokens, Sampling, SequenceStart, Slice, StageTime, StepPlan
from flyray.actors.weights import load_shard
from flyray.kernels.protocol import Activations, Kernels
from flyray.kernels.select import CPU_BACKENDS, select_kernels
from flyray.kernels.torch_kernels import TorchKernels

PAGE, PAGES = 4, 40
PLAN = StepPlan("e", 0, 0, "p", (), (), (), False)
GREEDY = Sampling(0.0, 1.0, 0, 0)
DRAWN = Sampling(1.5, 0.95, 40, 0, min_p=0.01)
PENALIZED = Sampling(
    0.8, 0.9, 20, 0, presence_penalty=0.5, repetition_penalty=1.5, logit_bias=((7, 0.5),), top_logprobs=2
)
PROMPTS = ((3, 14, 15), (92, 65, 35, 89, 79), (32, 38), (46, 26, 43, 38))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_tiny(tmp_path_factory.mktemp("captured") / "tiny"))


@pytest.fixture(scope="module", params=CPU_BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return select_kernels(request.param, 1)


class Travelling:
    """An exchange that no graph records: what comes out of it is new in every step, as from other shards."""

    captures = False

    def __init__(self) -> None:
        self.dropped = 0
        self._local = LocalExchange()

    def begin_step(self, step: int) -> None:
        self._local.begin_step(step)

    def dispatch(self, point: ExchangePoint, activations: Activations, ids: Tensor) -> Sent:
        scale = None if activations.scale is None else activations.scale.clone()
        return self._local.dispatch(point, replace(activations, values=activations.values.clone(), scale=scale), ids)

    def receive_dispatch(self, point: ExchangePoint) -> Received:
        return self._local.receive_dispatch(point)

    def send_back(self, point: ExchangePoint, received: Received, outputs: Tensor) -> None:
        self._local.send_back(point, received, outputs)

    def receive_combined(self, point: ExchangePoint, sent: Sent) -> Tensor:
        return self._local.receive_combined(point, sent).clone()


@dataclass
class Engine:
    """One shard without its links: greedy sequences, each with ten pages of its own."""

    stages: ModelStages
    interpreter: Interpreter
    table: SequenceTable
    step: int = 0

    def run(self, plan: StepPlan, timed: bool = False) -> NewTokens:
        times: list[StageTime] | None = [] if timed else None
        answer = self.interpreter.run(self.step, self.table.apply(plan), times)
        self.table.sampled(self.step, answer.tokens)
        self.step += 1
        return answer.tokens

    def begin(self, *samplings: Sampling) -> NewTokens:
        """All prompts in one step, drawn in these ways in turn."""
        how = itertools.cycle(samplings or (GREEDY,))
        starts = tuple(
            SequenceStart(s, replace(next(how), seed=s), False, history=prompt) for s, prompt in enumerate(PROMPTS)
        )
        slices = tuple(Slice(s, 0, prompt, pages(s, 0, len(prompt)), True) for s, prompt in enumerate(PROMPTS))
        return self.run(replace(PLAN, starts=starts, slices=slices))

    def decode(self, sequences: tuple[int, ...], lengths: dict[int, int], timed: bool = False) -> NewTokens:
        rows = decodes(*((s, lengths[s], pages(s, lengths[s], 1)) for s in sequences))
        for s in sequences:
            lengths[s] += 1
        return self.run(replace(PLAN, decodes=rows), timed)


def pages(number: int, start: int, count: int) -> tuple[int, ...]:
    """The pages that a sequence needs for `count` tokens from `start`, beyond those it has."""
    return tuple(number * 10 + page for page in range(-(-start // PAGE), -(-(start + count) // PAGE)))


def weights_of(checkpoint: Checkpoint, kernels: Kernels, precision: str = "w4a8") -> ShardWeights:
    return load_shard(checkpoint, ModelConfig.from_dict(checkpoint.config), precision, range(8), kernels)


def engine(
    checkpoint: Checkpoint, kernels: Kernels, exchange: Exchange, mixed: bool = False, precision: str = "w4a8"
) -> Engine:
    config = ModelConfig.from_dict(checkpoint.config)
    weights = weights_of(checkpoint, kernels, precision)
    stages = ModelStages(config, weights, kernels, KvPages.allocate(config, PAGES, PAGE, kernels))
    if mixed:
        change_experts(stages, checkpoint, kernels)
    interpreter = Interpreter(DataParallelActions(stages, kernels, exchange), sequence(config, "colocated", 1))
    return Engine(stages, interpreter, SequenceTable(PAGES, PAGE))


def change_experts(stages: ModelStages, checkpoint: Checkpoint, kernels: Kernels) -> None:
    """Every second expert of layer 1 from the same weights in 8 bits."""
    other = weights_of(checkpoint, kernels, "w8a8").layers[1].mlp.experts.blocks[0]  # type: ignore[union-attr]
    odd = [1, 3, 5, 7]
    part = replace(other, gate_up=chosen(other.gate_up, odd), down=chosen(other.down, odd))
    stages.replace_experts(1, stages.experts_of(1).replaced(odd, part))


def chosen(matrix: Any, experts: list[int]) -> Any:
    return type(matrix)(**{name: value[experts].contiguous() for name, value in vars(matrix).items()})


TURNS = ((0, 1, 2, 3), (0, 1, 2, 3), (3, 1), (2,), (1, 0), (0, 1, 2, 3), (0,), (2, 3), (1, 2, 3, 0))


@pytest.mark.parametrize("kind", ["local", "travelling", "mixed"])
def test_replayed_steps_give_the_bits_of_stages_one_by_one(kind: str, checkpoint: Checkpoint, kernels: Kernels) -> None:
    exchange = Travelling() if kind == "travelling" else LocalExchange()
    replayed, eager = (engine(checkpoint, kernels, exchange, kind == "mixed") for _ in range(2))
    assert replayed.begin() == eager.begin()
    lengths, others = ({s: len(prompt) for s, prompt in enumerate(PROMPTS)} for _ in range(2))
    for turn in TURNS * 2:
        assert replayed.decode(turn, lengths) == eager.decode(turn, others, timed=True)


def test_tokens_are_drawn_as_they_are_stage_by_stage(checkpoint: Checkpoint, kernels: Kernels) -> None:
    """In the captured step where all rows are drawn of the logits as they are, else behind it."""
    replayed, eager = (engine(checkpoint, kernels, LocalExchange()) for _ in range(2))
    assert replayed.begin(DRAWN, PENALIZED) == eager.begin(DRAWN, PENALIZED)
    lengths, others = ({s: len(prompt) for s, prompt in enumerate(PROMPTS)} for _ in range(2))
    for turn in ((0, 2), (0, 1), (2, 0), (1, 3), (0,), (3, 2), (0, 2), (2,)):
        assert replayed.decode(turn, lengths) == eager.decode(turn, others, timed=True)


def test_steps_on_a_device_give_the_bits_of_the_cpu(checkpoint: Checkpoint) -> None:
    """Weights, pages and the steps' inputs lie on the device; nothing on the host is in an operation with them."""
    here = engine(checkpoint, select_kernels("reference", 1), LocalExchange(), precision="bf16")
    with pretend_device() as device:
        there = engine(checkpoint, TorchKernels(device), LocalExchange(), precision="bf16")
        assert there.begin(PENALIZED) == here.begin(PENALIZED)
        lengths, others = ({s: len(prompt) for s, prompt in enumerate(PROMPTS)} for _ in range(2))
        for turn in ((0, 3), (1, 2)):
            assert there.decode(turn, lengths) == here.decode(turn, others)


def test_experts_that_change_are_run_from_the_next_step_on(checkpoint: Checkpoint, kernels: Kernels) -> None:
    """Beside an engine that never captures, so that it cannot run what it ran before."""
    replayed, eager = (engine(checkpoint, kernels, LocalExchange()) for _ in range(2))
    lengths, others = ({s: len(prompt) for s, prompt in enumerate(PROMPTS)} for _ in range(2))
    for bench in (replayed, eager):
        bench.begin()
    turn = (0, 1, 2, 3)
    before = replayed.decode(turn, lengths), eager.decode(turn, others, timed=True)
    own = replayed.stages.experts_of(1)
    for bench in (replayed, eager):
        change_experts(bench.stages, checkpoint, kernels)
    changed = replayed.decode(turn, lengths), eager.decode(turn, others, timed=True)
    for bench in (replayed, eager):
        bench.stages.replace_experts(1, own)
    back = replayed.decode(turn, lengths), eager.decode(turn, others, timed=True)
    assert all(one == other for one, other in (before, changed, back))
    unchanged = engine(checkpoint, kernels, LocalExchange())
    unchanged.begin()
    lengths = {s: len(prompt) for s, prompt in enumerate(PROMPTS)}
    unchanged.decode(turn, lengths)
    assert unchanged.decode(turn, lengths) != changed[0], "the experts make a difference"


def test_a_replay_that_is_refused_is_a_stage_error(checkpoint: Checkpoint) -> None:
    kernels = select_kernels("cpu", 1)
    bench = engine(checkpoint, kernels, LocalExchange())
    bench.begin()
    lengths = {s: len(prompt) for s, prompt in enumerate(PROMPTS)}
    bench.decode((0,), lengths)
    with pytest.raises(StageError, match=r"decode step of 1 rows: take_rows: rows\[0\] is 256, expected 0 to 255"):
        bench.run(replace(PLAN, slices=(Slice(0, lengths[0], (256,), pages(0, lengths[0], 1), True),)))


def test_the_steps_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_step, "KEPT_STEPS", 2)
    kernels = select_kernels("reference", 1)
    steps = captured_step.CapturedSteps()
    made = {rows: captured_step.CapturedStep(kernels, captured_step.DecodeInputs(rows, 3)) for rows in (1, 2, 3)}
    steps.keep(1, made[1])
    steps.keep(2, made[2])
    assert steps.find(1) is made[1]
    steps.keep(3, made[3])
    assert (steps.find(2), steps.find(1), steps.find(3)) == (None, made[1], made[3])
    steps.clear()
    assert steps.find(1) is None
