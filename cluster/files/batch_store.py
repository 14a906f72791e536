"""The batches of a folder: orders and wishes to cancel from fronts, states from the runner."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..scratch_folder import scratch_folder
from .batch_state import BatchOrder, BatchState, batch_body
from .durable import locked, publish, read_json, write_json
from .file_store import BATCH_INPUT, FileStore
from .identity import BATCH, Page, created_at, is_id, new_id

_ORDER, _STATE, _CANCEL, _RESULTS = "order.json", "state.json", "cancel.json", "results.jsonl"


class BatchRefused(Exception):
    """A change that a batch or a file in its present state does not take; the message says why."""


class BatchStore:
    """Batches by id, over the files that they read and write.

    All methods touch the disk and raise OSError; LookupError says that there is no such batch or file.
    """

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        """Makes the folder if need be."""
        self.files = FileStore(root)
        self.clock = clock
        self.runner_lock = root / "runner"
        self._lock, self._batches, self._new = root / "lock", root / "batches", root / "new"
        self._batches.mkdir(mode=0o700, exist_ok=True)

    def create(
        self,
        input_file: str,
        endpoint: str,
        window: str,
        window_s: int,
        metadata: dict[str, str] | None,
        model: str,
    ) -> dict[str, Any]:
        """A new batch over a file, as OpenAI's object. Raises BatchRefused for a file that is no input."""
        if (found := self.files.get(input_file)).purpose != BATCH_INPUT:
            raise BatchRefused(f"{input_file} has purpose {found.purpose!r}; a batch reads one of {BATCH_INPUT!r}")
        name = new_id(BATCH, self.clock)
        begin = created_at(name, BATCH)
        order = BatchOrder(name, begin, begin + window_s, input_file, endpoint, window, metadata, model)
        with locked(self._lock), scratch_folder(self._new, "order-") as scratch:
            self.files.mark_used(input_file, name)
            folder = scratch / name
            folder.mkdir()
            write_json(folder / _ORDER, asdict(order))
            publish(folder, self._batches / name)
        return batch_body(order, BatchState(), None)

    def body(self, name: str) -> dict[str, Any]:
        """OpenAI's object. Raises LookupError."""
        order, state = self.order(name), self.state(name)
        return batch_body(order, state, self.cancel_asked(name))  # asked last: what is cancelled was asked to be

    def list(self, page: Page) -> tuple[list[dict[str, Any]], bool]:
        """A page of all batches; and whether there are more."""
        names = page.candidates(self.names())
        return [self.body(name) for name in names[: page.limit]], len(names) > page.limit

    def names(self) -> list[str]:
        """Ids of all batches."""
        return [entry.name for entry in self._batches.iterdir() if is_id(entry.name, BATCH)]

    def order(self, name: str) -> BatchOrder:
        """Raises LookupError."""
        content = read_json(self._batches / name / _ORDER) if is_id(name, BATCH) else None
        if content is None:
            raise LookupError(name)
        return BatchOrder(**content)

    def state(self, name: str) -> BatchState:
        content = read_json(self._batches / name / _STATE)
        return BatchState() if content is None else BatchState.of_record(content)

    def write_state(self, name: str, state: BatchState) -> BatchState:
        """For the runner alone; returns the state."""
        write_json(self._batches / name / _STATE, state.record())
        return state

    def decide(self, name: str, step: Callable[[int | None], BatchState]) -> BatchState:
        """Writes the state that `step` makes of when cancelling was asked; nobody can ask meanwhile."""
        with locked(self._lock):
            return self.write_state(name, step(self.cancel_asked(name)))

    def cancel(self, name: str) -> dict[str, Any]:
        """Asks the runner to cancel. Asking again changes nothing. Raises LookupError, and BatchRefused at the end."""
        order = self.order(name)
        with locked(self._lock):
            state, asked = self.state(name), self.cancel_asked(name)
            if asked is None:
                if not state.cancellable:
                    raise BatchRefused(f"Cannot cancel a batch with status '{state.status}'.")
                asked = int(self.clock())
                write_json(self._batches / name / _CANCEL, {"at": asked})
        return batch_body(order, state, asked)

    def cancel_asked(self, name: str) -> int | None:
        """When somebody asked to cancel it."""
        content = read_json(self._batches / name / _CANCEL)
        return None if content is None else content["at"]

    def delete_file(self, name: str) -> None:
        """Raises LookupError, and BatchRefused while a batch reads it."""
        with locked(self._lock):
            batch = self.files.delete(name, self._is_running)
        if batch:
            raise BatchRefused(f"{name} is the input of {batch}, which has not ended; cancel that first")

    def results(self, name: str) -> Path:
        """Where the runner writes answers as they come."""
        return self._batches / name / _RESULTS

    def _is_running(self, name: str) -> bool:
        return (self._batches / name / _ORDER).exists() and not self.state(name).final
