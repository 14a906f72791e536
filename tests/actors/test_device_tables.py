"""What decode steps read on a device, step after step, against the same made anew from all that the shard knows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flyray.actors.device_inputs import DeviceInputs
from flyray.actors.device_tables import _HostPlace
from flyray.actors.request import Generate
from flyray.actors.scheduler import Scheduler, SchedulerConfig
from flyray.actors.sequence_table import SequenceTable
from flyray.actors.step_batch import StepBatch
from flyray.actors.step_plan import NewTokens, Sampling, StepPlan, StepResult

CPU = torch.device("cpu")
ROWS, PAGE_SIZE, PAGES, CONTEXT = 6, 2, 60, 40


class WatchedEvent:
    """Of one place on the host: what was copied from it stays as it was until somebody has waited for the copy."""

    def __init__(self, place: _HostPlace) -> None:
        self._arrays = place.cell_numbers, place.page_numbers, place.line_numbers
        self._copied: list[bytes] = []

    def record(self) -> None:
        assert not self._copied
        self._copied = self._bytes()

    def synchronize(self) -> None:
        assert self._copied in ([], self._bytes())
        self._copied = []

    def _bytes(self) -> list[bytes]:
        return [array.tobytes() for array in self._arrays]


def watched() -> DeviceInputs:
    inputs = DeviceInputs(ROWS, CONTEXT // PAGE_SIZE, CPU)
    for place in inputs._tables._places:
        place._copied = WatchedEvent(place)  # pyright: ignore[reportAttributeAccessIssue]
    return inputs


def check(inputs: DeviceInputs, batch: StepBatch, rows: int) -> None:
    """Rows of the step, and behind them copies of the one with the shortest context."""
    found, wanted, count = inputs.paged(rows), batch.paged, len(batch.ids)
    shortest = int(wanted.context_len.argmin())
    for row in range(rows):
        like = row if row < count else shortest
        length = int(wanted.context_len[like])
        used = -(-length // PAGE_SIZE)
        assert int(found.context_len[row]) == length
        assert found.page_table[row, :used].tolist() == wanted.page_table[like, :used].tolist()
        assert (int(found.positions[row]), int(found.slots[row])) == (length - 1, int(wanted.slots[like]))
        page = int(found.page_table[row, used - 1])
        assert int(found.slots[row]) == page * PAGE_SIZE + (length - 1) % PAGE_SIZE
        assert inputs.tokens(rows)[row] == batch.tokens[like]


@settings(max_examples=60)
@given(st.data())
def test_the_device_has_what_the_shard_knows(data: st.DataObject) -> None:
    """Requests come and go, some are preempted; some steps are not run on the device, which then must catch up."""
    config = SchedulerConfig("engine", 0, 1, data.draw(st.integers(24, PAGES)), PAGE_SIZE, 8, ROWS, CONTEXT, 9, "p")
    scheduler, table, inputs = Scheduler(config), SequenceTable(config.num_pages, PAGE_SIZE), watched()
    for step in range(data.draw(st.integers(5, 60))):
        if data.draw(st.integers(0, 3)) == 0:
            prompt = (1,) * data.draw(st.integers(1, 9))
            request = Generate(
                f"r{step}", prompt, data.draw(st.integers(1, 30)), Sampling(0.0, 1.0, 0, 0), (), 0, False
            )
            scheduler.add(request)
        if data.draw(st.integers(0, 9)) == 0:
            scheduler.cancel(f"r{data.draw(st.integers(0, step))}")
        plans = scheduler.schedule()
        if plans is None:
            continue
        plan: StepPlan = plans[0]
        batch = table.apply(plan)
        if plan.decode_rows and data.draw(st.integers(0, 5)):
            rows = data.draw(st.integers(plan.decode_rows, ROWS))
            inputs.take(batch, rows)
            check(inputs, batch, rows)
        news = NewTokens(batch.sampled, (step % 9,) * len(batch.sampled), (-1.0,) * len(batch.sampled))
        table.sampled(plan.step, news)
        scheduler.complete([StepResult("engine", 0, plan.step, 0, news, (), (), "")])


def test_a_step_without_rows_reads_the_first_entry_and_writes_nowhere() -> None:
    inputs = watched()
    batch = SequenceTable(PAGES, PAGE_SIZE).apply(StepPlan("e", 0, 0, "p", (), (), (), False, 2))
    inputs.take(batch, 2)
    paged = inputs.paged(2)
    assert (inputs.tokens(2).tolist(), paged.positions.tolist(), paged.slots.tolist()) == ([0, 0], [0, 0], [-1, -1])
    assert (paged.context_len.tolist(), paged.page_table[:, 0].tolist()) == ([1, 1], [0, 0])
