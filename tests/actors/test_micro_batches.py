"""In how many micro-batches a step runs, and that it gives the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.measured_costs import stage_costs
from flyray.actors.micro_batches import MicroBatchChoice
from flyray.actors.page_table import PageTable
from flyray.actors.request import TracedStep
from flyray.actors.sequence import COLOCATED, LayerPlan, sequence
from flyray.actors.sequence_sampler import SequenceSampler
from flyray.actors.stage_program import ATTENTIONS, Attention
from flyray.actors.step_batch import StepBatch
from flyray.actors.step_plan import Sampling, SequenceStart, StageTime

LAYERS = LayerPlan(6, 1)


def choice(attention: Attention = "data_parallel", shards: int = 2) -> MicroBatchChoice:
    return MicroBatchChoice([sequence(LAYERS, COLOCATED, number, attention) for number in (1, 2)], shards)


def step(rows: int, fixed: float, a_row: float, attention: Attention = "data_parallel") -> list[TracedStep]:
    """On two shards, each stage takes `fixed` and `a_row` microseconds for each of its rows."""
    took = round(1000 * (fixed + a_row * rows))
    stages = sequence(LAYERS, COLOCATED, 1, attention).stages[COLOCATED]
    times = tuple(StageTime(stage.name, 0, took) for stage in stages)
    return [TracedStep(0, shard, times) for shard in range(2)]


def test_costs_are_medians_and_waiting_does_not_count() -> None:
    def traced(number: int, shard: int, attention: int, experts: int) -> TracedStep:
        times = (StageTime("attention.0.0", 0, attention), StageTime("experts.1.0", attention, attention + experts))
        return TracedStep(number, shard, times)

    steps = [traced(0, 0, 1000, 9000), traced(0, 1, 3000, 2000), traced(1, 0, 2000, 4000), traced(1, 1, 2000, 8000)]
    assert stage_costs(steps) == {"attention": 2.0, "experts": 3.0}
    assert stage_costs([]) == {}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_step_is_divided_where_travel_outweighs_starting_twice(attention: Attention) -> None:
    found = choice(attention)
    names = [f"{'colocated' if attention == 'data_parallel' else attention}-{number}" for number in (1, 2)]
    for rows in (8, 256):
        assert found.program(256, 8) == names[0], "nothing is known yet"
        found.measured(rows, names[0], step(rows, 0.0, 0.25, attention))
    assert found.program(256, 8) == names[1]
    assert found.program(256, 1) == names[0], "one sequence stays whole"
    assert found.program(2000, 8) == names[0], "what travels is little there"
    assert found.program(4, 4) == names[0], "below what was measured a stage takes what the smallest step's did"
    for rows in (8, 256):
        found.measured(rows, names[0], step(rows, 100.0, 0.25, attention))
    assert found.program(256, 8) == names[0]


def test_only_whole_steps_of_one_micro_batch_count() -> None:
    found = choice()
    for rows in (8, 64):
        found.measured(rows, "colocated-2", step(rows, 0.0, 1.0))
        found.measured(rows, "colocated-1", [TracedStep(0, 0, step(rows, 0.0, 1.0)[0].stages[:3])])
        found.measured(0, "colocated-1", step(rows, 0.0, 1.0))
    assert found.program(64, 8) == "colocated-1"
    found.measured(64, "colocated-1", step(64, 0.0, 1.0))
    found.measured(60, "colocated-1", step(60, 0.0, 1.0))  # in the place of the step of 64
    assert found.program(64, 8) == "colocated-1"


def test_a_single_program_needs_no_choice() -> None:
    found = MicroBatchChoice([sequence(LAYERS, COLOCATED, 1)], 1)
    for rows in (8, 64):
        found.measured(rows, "colocated-1", step(rows, 0.0, 1.0))
    assert found.program(64, 8) == "colocated-1"


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=12), st.integers(1, 4))
def test_parts_of_a_step_are_together_the_step(sequences: list[tuple[int, bool]], parts: int) -> None:
    bounds = [0]
    for rows, _ in sequences:
        bounds.append(bounds[-1] + rows)
    sampled = [number for number, (_, samples) in enumerate(sequences) if samples]
    sampler = SequenceSampler(SequenceStart(0, Sampling(0.0, 1.0, 0, 0), False))
    positions = np.array([place for rows, _ in sequences for place in range(rows)], np.int64)
    whole = StepBatch(
        np.stack((np.arange(bounds[-1]), positions, positions)),
        np.array(bounds),
        np.arange(len(sequences)),
        PageTable(16),
        tuple(sampled),
        np.array([bounds[number + 1] - 1 for number in sampled], np.int64),
        (sampler,) * len(sampled),
        (),
        True,
    )
    split = whole.split(parts)
    assert len(split) == parts
    assert [token for part in split for token in part.ids] == whole.ids.tolist()
    assert [length for part in split for length in part.lengths] == whole.lengths.tolist()
    assert [number for part in split for number in part.sampled] == sampled
    assert [part.ids[row] for part in split for row in part.sampled_rows] == whole.sampled_rows.tolist()
    longest = max((rows for rows, _ in sequences), default=0)
    for part in split:
        assert part.bounds[0] == 0
        assert part.bounds[-1] == len(part.ids) <= -(-bounds[-1] // parts) + longest
