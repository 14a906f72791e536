"""The tensors of a step, against a plain account of where each token goes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from decode_rows import decodes
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.request import Generate
from flyray.actors.scheduler import Scheduler, SchedulerConfig
from flyray.actors.sequence_table import PlanError, SequenceTable
from flyray.actors.step_batch import StepBatch
from flyray.actors.step_plan import (
    Decodes,
    NewTokens,
    PromptScores,
    Sampling,
    SequenceStart,
    Slice,
    StepPlan,
    StepResult,
)

GREEDY = Sampling(0.0, 1.0, 0, 0)
PLAN = StepPlan("engine", 0, 0, "colocated-1", (), (), (), False)
START = SequenceStart(1, GREEDY, True)
PAGE_SIZE, PAGES = 4, 60


def begun(tokens: tuple[int, ...] = (5, 6, 7), pages: tuple[int, ...] = (2,)) -> SequenceTable:
    table = SequenceTable(PAGES, PAGE_SIZE)
    table.apply(replace(PLAN, starts=(START,), slices=(Slice(1, 0, tokens, pages, True),)))
    return table


def test_a_prompt_then_the_sampled_token() -> None:
    table = SequenceTable(PAGES, PAGE_SIZE)
    batch = table.apply(replace(PLAN, starts=(START,), slices=(Slice(1, 0, (5, 6, 7, 8, 9), (3, 1), True),)))
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9]
    assert batch.paged.slots.tolist() == [12, 13, 14, 15, 4]
    assert batch.paged.context_len.tolist() == [5]
    assert (batch.sampled, batch.sampled_rows.tolist()) == ((1,), [4])
    assert batch.sampling[0].position == 5
    assert batch.scored[0].targets == (6, 7, 8, 9)
    table.sampled(0, NewTokens((1,), (44,), (-1.0,)))
    batch = table.apply(replace(PLAN, step=1, decodes=decodes((1, 5))))
    assert batch.tokens.tolist() == [44]
    assert batch.paged.positions.tolist() == [5]
    assert batch.paged.slots.tolist() == [5]
    assert batch.scored == ()
    assert len(table) == 1
    assert table.apply(replace(PLAN, step=2, ends=(1,))).tokens.tolist() == []
    assert len(table) == 0


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (replace(PLAN, ends=(7,)), "ends sequence 7, which is not here"),
        (replace(PLAN, starts=(START,)), "starts sequence 1, which is here already"),
        (replace(PLAN, slices=(Slice(7, 0, (1,), (0,), True),)), "runs sequence 7, which is not here"),
        (replace(PLAN, slices=(Slice(1, 3, (), (), True),)), "sequence 1 got a slice without tokens"),
        (replace(PLAN, decodes=decodes((7, 0))), "runs sequence 7, which is not here"),
        (replace(PLAN, decodes=decodes((1, 3))), "sequence 1 has no sampled token"),
        (replace(PLAN, decodes=decodes((1, 2))), "has 3 tokens in 1 pages of 4; a slice of 1 from 2 with 0 new"),
        (
            replace(PLAN, decodes=decodes((1, 3, (5,)))),
            "in 1 pages of 4; a slice of 1 from 3 with 1 new pages does not",
        ),
        (replace(PLAN, decodes=decodes((1, 3, (60,)))), r"got pages \(60,\), the cache has 60"),
        (replace(PLAN, decodes=decodes((1, 3), (1, 3))), "the plan's decodes do not fit each other"),
        (replace(PLAN, decodes=Decodes((1,), (3, 3))), "the plan's decodes do not fit each other"),
        (replace(PLAN, decodes=Decodes((1,), (3,), (1,), (5,))), "have a page for row 1, they have 1"),
        (
            replace(PLAN, slices=(Slice(1, 2, (1,), (), True),)),
            "has 3 tokens in 1 pages of 4; a slice of 1 from 2 with",
        ),
        (
            replace(PLAN, slices=(Slice(1, 3, (1, 2), (), True),)),
            "a slice of 2 from 3 with 0 new pages does not",
        ),
        (
            replace(PLAN, slices=(Slice(1, 3, (1,), (5,), True),)),
            "a slice of 1 from 3 with 1 new pages does not follow",
        ),
        (
            replace(PLAN, slices=(Slice(1, 4, (1,), (5,), True),)),
            "a slice of 1 from 4 with 1 new pages does not follow",
        ),
        (replace(PLAN, slices=(Slice(1, 6, (1,), (5, 6), True),)), "a slice of 1 from 6 with 2 new pages does not"),
        (
            replace(PLAN, slices=(Slice(1, 8, (1,), (5, 6, 7, 8), True),)),
            "a slice of 1 from 8 with 4 new pages",
        ),
        (replace(PLAN, slices=(Slice(1, 3, (1, 2), (60,), True),)), r"got pages \(60,\), the cache has 60"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: StepPlan, named: str) -> None:
    with pytest.raises(PlanError, match=named):
        begun().apply(plan)


def test_a_prefill_goes_on_behind_pages_of_the_cache() -> None:
    """A page that it had begun is another's then, which holds the same tokens."""
    table = begun((5, 6, 7, 8, 9), (2, 4))
    batch = table.apply(replace(PLAN, step=1, slices=(Slice(1, 12, (1, 2), (7, 8, 3), True),)))
    assert batch.paged.page_table.tolist() == [[2, 7, 8, 3]]
    assert batch.paged.positions.tolist() == [12, 13]
    assert batch.paged.slots.tolist() == [12, 13]
    assert (batch.paged.context_len.tolist(), batch.sampling[0].position) == ([14], 14)


class Account:
    """What must come of plans: for every sequence its tokens, found again through the slots they were written to."""

    def __init__(self) -> None:
        self.cache: dict[int, int] = {}

    def write(self, batch: StepBatch) -> None:
        slots = batch.paged.slots.tolist()
        assert len(set(slots)) == len(slots)
        self.cache.update(zip(slots, batch.tokens.tolist(), strict=True))

    def read(self, batch: StepBatch, row: int) -> list[int]:
        """The tokens that a sequence of the batch sees."""
        table = batch.paged.page_table[row].tolist()
        length = int(batch.paged.context_len[row])
        places = [table[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE for place in range(length)]
        return [self.cache[place] for place in places]


def next_token(seen: list[int]) -> int:
    """A stand-in for the model that depends on everything before."""
    return (sum((place + 1) * token for place, token in enumerate(seen)) * 31 + 7) % 97


@given(
    prompts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.booleans()), min_size=1, max_size=8),
    budget=st.integers(3, 16),
    ahead=st.integers(1, 2),
)
def test_with_the_scheduler_every_sequence_sees_its_own_tokens(
    prompts: list[tuple[int, int, bool]], budget: int, ahead: int
) -> None:
    config = SchedulerConfig("engine", 0, 1, PAGES, PAGE_SIZE, budget, 8, 40, 97, "colocated-1")
    scheduler, table, account = Scheduler(config), SequenceTable(PAGES, PAGE_SIZE), Account()
    wanted: dict[str, tuple[list[int], list[int]]] = {}
    for number, (length, count, score) in enumerate(prompts):
        prompt = [(number * 13 + place * 7) % 97 for place in range(length)]
        seen = list(prompt)
        for _ in range(count):
            seen.append(next_token(seen))
        wanted[str(number)] = seen[length:], prompt[1:] if score else []
        assert scheduler.add(Generate(str(number), tuple(prompt), count, GREEDY, (), 0, score)) is None
    found = {name: ([], []) for name in wanted}
    plans: list[StepPlan] = []
    while True:
        while len(plans) < ahead and (plan := scheduler.schedule()):
            plans.append(plan[0])
        if not plans:
            break
        batch = table.apply(plan := plans.pop(0))
        account.write(batch)
        rows = [*plan.decodes.sequences, *(part.sequence for part in plan.slices)]
        tokens = [next_token(account.read(batch, rows.index(sequence))) for sequence in batch.sampled]
        news = NewTokens(batch.sampled, tuple(tokens), (-1.0,) * len(tokens))
        table.sampled(0, news)
        ends = batch.paged.query_start.tolist()[1:]
        assert list(batch.sampled_rows) == [ends[rows.index(sequence)] - 1 for sequence in batch.sampled]
        # A target as its own score, so that the scores spell the prompt.
        scores = [PromptScores(each.sequence, each.start, tuple(map(float, each.targets))) for each in batch.scored]
        result = StepResult("engine", 0, plan.step, 0, news, tuple(scores), (), "")
        for progress in scheduler.complete([result]).batch("engine").news:
            found[progress.request][0].extend(progress.tokens)
            found[progress.request][1].extend(map(int, progress.scores))
    assert found == wanted
    assert len(table) == 0
