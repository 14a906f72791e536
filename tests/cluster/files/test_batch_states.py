"""Batches over any course of events: every state follows from the one before, and what has ended stays as it is."""

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from openai.types import Batch

from flyray.cluster.files.batch_state import FINAL, BatchFault, BatchState, BatchUsage
from flyray.cluster.files.batch_store import BatchRefused, BatchStore
from flyray.cluster.files.identity import Page

NEXT = {
    "validating": {"validating", "in_progress", "cancelling", "failed", "expired", "cancelled"},
    "in_progress": {"in_progress", "finalizing", "cancelling", "cancelled", "expired", "completed"},
    "finalizing": {"finalizing", "completed", "expired", "failed"},
    "cancelling": {"cancelling", "cancelled"},
}
USAGE = BatchUsage(5, 1, 3, 2)


class OneBatch(RuleBasedStateMachine):
    """A runner, and clients that look, cancel and delete, in any order."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.now = 1_800_000_000.0
        self.store = BatchStore(Path(self.folder.name), lambda: self.now)
        with self.store.files.create() as new:
            new.write(b"{}\n")
            self.input = new.keep("in.jsonl", "batch").id
        self.shown = self.store.create(self.input, "/v1/completions", "1m", 60, {"a": "b"}, "m")
        self.name = self.shown["id"]
        self.deleted = False

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(seconds=st.integers(1, 40))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def cancel(self) -> None:
        before = self.store.body(self.name)["status"]
        if before in ("validating", "in_progress", "cancelling"):
            assert self.store.cancel(self.name)["status"] == "cancelling"
        else:
            if before == "cancelled":
                assert self.store.cancel(self.name)["status"] == before
            else:
                with pytest.raises(BatchRefused, match=f"with status '{before}'"):
                    self.store.cancel(self.name)

    @rule()
    def delete(self) -> None:
        running = self.store.body(self.name)["status"] not in FINAL
        with suppress(LookupError):
            if running and not self.deleted:
                with pytest.raises(BatchRefused, match="is the input of batch_"):
                    self.store.delete_file(self.input)
            else:
                self.store.delete_file(self.input)
                self.deleted = True

    @rule(good=st.booleans())
    def run(self, good: bool) -> None:
        state = self.store.state(self.name)

        def step(asked: int | None) -> BatchState:
            at = int(self.now)
            if state.status == "validating" and asked is not None:
                return state.to("cancelled", ended_at=at)
            if state.status == "validating":
                if good:
                    return state.to("in_progress", total=3, in_progress_at=at)
                return state.to("failed", faults=(BatchFault("x", "y", 1),), ended_at=at)
            outcome = "cancelled" if asked is not None else "completed" if good else "expired"
            return state.to("finalizing", outcome=outcome, finalizing_at=at, output_file="file-1", error_file="file-2")

        if state.status == "finalizing":
            self.store.write_state(
                self.name, state.to(state.outcome, completed=2, failed=1, usage=USAGE, ended_at=int(self.now))
            )
        elif not state.final:
            self.store.decide(self.name, step)

    @invariant()
    def what_is_shown_follows(self) -> None:
        shown = self.store.body(self.name)
        batch = Batch.model_validate(shown, strict=True)
        if self.shown["status"] in FINAL:
            assert shown == self.shown
        else:
            assert batch.status in NEXT[self.shown["status"]]
        for status in FINAL:
            assert (shown[f"{status}_at"] is not None) == (batch.status == status)
        if batch.status in ("cancelling", "cancelled"):
            assert batch.cancelling_at is not None
        assert (batch.output_file_id is None) == (batch.usage is None or batch.usage.total_tokens == 0)
        assert self.store.list(Page(1)) == ([shown], False)
        self.shown = shown


OneBatch.TestCase.settings = settings(max_examples=10, stateful_step_count=12)
TestOneBatch = OneBatch.TestCase


@pytest.mark.parametrize(("before", "after"), [("completed", "in_progress"), ("validating", "finalizing")])
def test_a_step_that_there_is_not_is_refused(before: str, after: str) -> None:
    with pytest.raises(ValueError, match=f"that is {before}  cannot become {after}"):
        BatchState(status=before).to(after)


def test_usage_adds_up() -> None:
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert BatchUsage().plus(usage) == USAGE
    assert USAGE.plus({"prompt_tokens": 1, "completion_tokens": 1}).body()["total_tokens"] == 10
