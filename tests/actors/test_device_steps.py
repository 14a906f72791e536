"""Decode steps on a device: begun before the one before them is done, padded, from tokens that the device has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from decode_rows import decodes
from pretend_device import pretend_device
from tiny_checkpoint import write_tiny
from torch import Tensor

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.device_inputs import DeviceInputs
from flyray.actors.device_steps import padded_rows
from flyray.actors.exchange import LocalExchange
from flyray.actors.interpreter import Interpreter
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.kv_pages import KvPages
from flyray.actors.model.stages import ModelStages
from flyray.actors.sequence import sequence
from flyray.actors.sequence_table import SequenceTable
from flyray.actors.stage_actions import DataParallelActions
from flyray.actors.step_answer import Answer, Answered, AnswerPlace, StageError
from flyray.actors.step_plan import NewTokens, Sampling, SequenceStart, Slice, StepPlan
from flyray.actors.weights import load_shard
from flyray.kernels.protocol import Drawn, Kernels, SamplingRow, T
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.sampling import SamplingRows
from flyray.kernels.torch_kernels import TorchKernels

PAGE, PAGES = 4, 120
CPU = torch.device("cpu")
PLAN = StepPlan("e", 0, 0, "p", (), (), (), False)
GREEDY = Sampling(0.0, 1.0, 0, 0)
PROMPTS = {s: tuple((7 * s + 3 * place) % 97 for place in range(2 + s % 5)) for s in range(11)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_tiny(tmp_path_factory.mktemp("device") / "tiny"))


@dataclass
class Engine:
    """One shard without its links, each sequence with ten pages of its own. It begins a step before it takes the
    answer of the one before, where the table says that it can."""

    interpreter: Interpreter
    table: SequenceTable
    ahead: bool
    step: int = 0
    most: int = 0
    lengths: dict[int, int] = field(default_factory=lambda: {s: len(prompt) for s, prompt in PROMPTS.items()})
    running: list[tuple[int, Answer]] = field(default_factory=list)
    told: list[NewTokens] = field(default_factory=list)

    def begin(self, **changes: Sampling) -> None:
        starts = tuple(
            SequenceStart(s, changes.get(f"s{s}", GREEDY), False, history=prompt) for s, prompt in PROMPTS.items()
        )
        slices = tuple(Slice(s, 0, prompt, pages(s, 0, len(prompt)), True) for s, prompt in PROMPTS.items())
        self._run(replace(PLAN, starts=starts, slices=slices))

    def decode(self, sequences: tuple[int, ...], ends: tuple[int, ...] = ()) -> None:
        rows = decodes(*((s, self.lengths[s], pages(s, self.lengths[s], 1)) for s in sequences))
        for s in sequences:
            self.lengths[s] += 1
        self._run(replace(PLAN, ends=ends, decodes=rows, decode_rows=len(sequences)))

    def finish(self) -> list[NewTokens]:
        while self.running:
            self._take()
        return self.told

    def _run(self, plan: StepPlan) -> None:
        while len(self.running) > (self.ahead and self.table.can_follow(plan)):
            self._take()
        batch = self.table.apply(plan)
        answer = self.interpreter.begin(self.step, batch, plan.decode_rows, None if self.ahead else [])
        self.table.promise(self.step, batch)
        self.running.append((self.step, answer))
        self.most = max(self.most, len(self.running))
        self.step += 1
        if isinstance(answer, Answered):  # as a shard does with what is ready; here, what a device computes never is
            self.finish()

    def _take(self) -> None:
        step, answer = self.running.pop(0)
        tokens = answer.wait().tokens
        self.table.sampled(step, tokens)
        self.told.append(tokens)


def pages(number: int, start: int, count: int) -> tuple[int, ...]:
    return tuple(number * 10 + page for page in range(-(-start // PAGE), -(-(start + count) // PAGE)))


def engine(checkpoint: Checkpoint, kernels: Kernels, ahead: bool) -> Engine:
    config = ModelConfig.from_dict(checkpoint.config)
    weights = load_shard(checkpoint, config, "w4a8", range(8), kernels)
    stages = ModelStages(config, weights, kernels, KvPages.allocate(config, PAGES, PAGE, kernels))
    interpreter = Interpreter(DataParallelActions(stages, kernels, LocalExchange()), sequence(config, "colocated", 1))
    return Engine(interpreter, SequenceTable(PAGES, PAGE), ahead)


def run(bench: Engine, **changes: Sampling) -> list[NewTokens]:
    bench.begin(**changes)
    every = tuple(PROMPTS)
    for turn in (every, every, every[:9], every[8::-1], (3, 1), (1,), (0, 1, 2), every[1:]):
        bench.decode(turn)
    bench.decode((4, 5), ends=(0, 1))
    bench.decode((5, 6))
    return bench.finish()


class LateBranches(TorchKernels):
    """Runs what a branch computes or writes at the join, as late as a device may."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._open: list[tuple[Tensor | None, Callable[[], object]]] = []
        self._writes = True

    def branch(self, rows: int, run: Callable[[], T]) -> T:
        self._writes = False
        result = run()
        self._writes = True
        assert result is None or isinstance(result, Tensor)
        if result is not None:
            result.fill_(torch.nan)
        self._open.append((result, run))
        return result

    def join(self) -> None:
        for result, run in self._open:
            late = run()
            if result is not None:
                assert isinstance(late, Tensor)
                result.copy_(late)
        self._open.clear()

    def write_kv(self, *rows: Any) -> None:
        if self._writes:
            super().write_kv(*rows)


DRAWN = {"s1": Sampling(0.8, 0.9, 20, 5), "s3": Sampling(1.0, 0.95, 0, 6), "s5": Sampling(1.3, 1.0, 0, 7, min_p=0.02)}


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
def test_steps_begun_ahead_give_the_bits_of_stages_one_by_one(
    checkpoint: Checkpoint, drawn: dict[str, Sampling]
) -> None:
    device, eager = engine(checkpoint, LateBranches(), True), engine(checkpoint, ReferenceKernels(), False)
    assert run(device, **drawn) == run(eager, **drawn)
    assert (device.most, eager.most) == (2, 1)


def test_rows_that_are_penalized_wait_for_the_step_before(checkpoint: Checkpoint) -> None:
    penalized = replace(GREEDY, repetition_penalty=1.5, min_tokens=2, stop_ban=(9,))
    changes = DRAWN | {"s3": replace(DRAWN["s3"], top_logprobs=2), "s6": penalized}
    device, eager = engine(checkpoint, TorchKernels(CPU), True), engine(checkpoint, ReferenceKernels(), False)
    assert run(device, **changes) == run(eager, **changes)


def test_everything_lies_on_the_device(checkpoint: Checkpoint) -> None:
    here = engine(checkpoint, ReferenceKernels(), False)
    here.begin(**DRAWN)
    for turn in ((0, 3, 5), (3, 5)):
        here.decode(turn)
    with pretend_device() as device:
        there = engine(checkpoint, TorchKernels(device), True)
        there.begin(**DRAWN)
        for turn in ((0, 3, 5), (3, 5)):
            there.decode(turn)
        assert there.finish() == here.finish()
        assert there.most == 2


def test_numbers_of_rows_that_are_captured() -> None:
    sizes = [padded_rows(rows) for rows in range(1, 514)]
    assert sizes[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 16]
    assert (sizes[63], sizes[64], sizes[255], sizes[256], sizes[511], sizes[512]) == (64, 96, 256, 320, 512, 0)
    assert all(rows <= size for rows, size in enumerate(sizes[:512], 1))
    assert padded_rows(0) == 0


def test_padding_copies_the_row_with_the_shortest_context() -> None:
    table = SequenceTable(PAGES, PAGE)
    starts = (SequenceStart(0, DRAWN["s5"], False), SequenceStart(1, GREEDY, False))
    slices = (Slice(0, 0, (5, 6, 7, 8, 9), pages(0, 0, 5), True), Slice(1, 0, (11, 12), pages(1, 0, 2), True))
    batch = table.apply(StepPlan("e", 0, 0, "p", (), starts, slices, False))
    table.promise(0, batch)
    table.sampled(0, NewTokens((1,), (44,), (-1.0,)))
    batch = table.apply(replace(PLAN, step=1, decodes=decodes((0, 5), (1, 2)), decode_rows=2))
    assert batch.tokens.tolist() == [-1 - 4, 44]
    inputs = DeviceInputs(8, 3, CPU)
    inputs.last[:5] = torch.tensor([60, 61, 62, 63, 64])
    inputs.take(batch, 4)
    paged = inputs.paged(4)
    assert inputs.tokens(4).tolist() == [64, 44, 44, 44]
    assert paged.context_len.tolist() == [6, 3, 3, 3]
    assert paged.positions.tolist() == [5, 2, 2, 2]
    assert paged.slots.tolist() == [5, 42, 42, 42]
    assert paged.page_table[:, 0].tolist() == [0, 10, 10, 10]
    assert paged.query_start.tolist() == [0, 1, 2, 3, 4]
    row = SamplingRow(1.3, 1.0, 0, 7, 6, 0.02)
    assert torch.equal(inputs.words[:1], SamplingRows([row]).words)
    assert inputs.words[1:4, 0].tolist() == [0.0, 0.0, 0.0]
    empty = table.apply(StepPlan("e", 0, 2, "p", (), (), (), False, 2))
    inputs.take(empty, 2)
    paged = inputs.paged(2)
    assert (inputs.tokens(2).tolist(), paged.slots.tolist()) == ([0, 0], [-1, -1])
    assert (paged.context_len.tolist(), paged.page_table[:, 0].tolist()) == ([1, 1], [0, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_of_which_no_token_can_be_taken(value: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5], [0.0, value, 0.5]])
    found = TorchKernels(CPU).draw(logits, SamplingRows([SamplingRow(0.7, 0.01, 0, 1, 2)] * 2).words)
    answer = AnswerPlace(4, CPU).answer(found, (7, 9))
    with pytest.raises(StageError, match=f"largest of logits row 1 is {value}, expected a finite number"):
        answer.wait()
    kept = Drawn(found.tokens[:1], found.logprobs[:1], found.largest[:1])
    told = AnswerPlace(4, CPU).answer(kept, (7,)).wait().tokens
    assert (told.sequences, told.tokens) == ((7,), (1,))
    assert told.logprobs == pytest.approx((float(logits[0].log_softmax(0)[1]),), abs=1e-6)
