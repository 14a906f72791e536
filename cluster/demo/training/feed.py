"""Where the training rows come from: the tokenized text, and worker processes that make fresh tasks."""

import multiprocessing
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .packing import pack_rows
from .sources import GROUPS
from .vocabulary import Vocabulary

ROWS_A_FILE = {1024: 256, 4096: 64}
LONGEST_RECALL = {1024: 70, 4096: 260}  # entries of the long look-ups
GROUP_SHARES = {"prose": 0.45, "docs": 0.27, "code": 0.28}
OLDEST_REPEATED = 50_000  # rows used again if the workers fall behind
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Order:
    """What a worker is to do: short rows until ``switch_at``, long ones until ``stop_at`` (wall-clock times)."""

    seed: int
    tokenizer: str
    folder: str
    switch_at: float
    stop_at: float
    short: int
    long: int


def work(order: Order) -> None:
    """Writes files of task rows until the time is over."""
    vocabulary, folder, count = Vocabulary(Path(order.tokenizer)), Path(order.folder), 0
    rng = random.Random(order.seed)
    for length, until in ((order.short, order.switch_at), (order.long, order.stop_at)):
        rows = pack_rows(rng, vocabulary, length, LONGEST_RECALL.get(length, 30))
        while time.time() < until:
            block = np.stack([next(rows) for _ in range(ROWS_A_FILE.get(length, 8))])
            unfinished = folder / f"unfinished-{order.seed}.npy"
            np.save(unfinished, block)
            unfinished.rename(folder / f"rows-{length}-{order.seed:03d}-{count:05d}.npy")
            count += 1


class TaskRows:
    """Rows of tasks from worker processes, each used once while they keep up."""

    def __init__(self, orders: list[Order], device: str) -> None:
        self.folder, self.device = Path(orders[0].folder), device
        self.rows: dict[int, list[Tensor]] = {orders[0].short: [], orders[0].long: []}
        self.used = dict.fromkeys(self.rows, 0)
        self.polled = 0.0
        context = multiprocessing.get_context("spawn")
        self.workers = [context.Process(target=work, args=(order,), daemon=True) for order in orders]
        for worker in self.workers:
            worker.start()

    def poll(self) -> None:
        """Takes over finished files."""
        if time.time() - self.polled < POLL_SECONDS:
            return
        self.polled = time.time()
        for path in sorted(self.folder.glob("rows-*.npy")):
            length = int(path.name.split("-")[1])
            self.rows[length] += torch.from_numpy(np.load(path).astype(np.int32)).to(self.device).unbind(0)
            path.unlink()

    def ready(self, length: int) -> int:
        """How many rows of a length were made so far."""
        self.poll()
        return len(self.rows[length])

    def take(self, count: int, length: int) -> list[Tensor]:
        """The next rows ``[length + 1] i32``; late ones again when there are none."""
        rows = self.rows[length]
        taken = []
        for _ in range(count):
            if self.used[length] >= len(rows):
                self.used[length] = max(0, len(rows) - OLDEST_REPEATED)
            taken.append(rows[self.used[length]])
            self.used[length] += 1
        return taken

    def stop(self) -> None:
        """Ends the workers."""
        for worker in self.workers:
            worker.terminate()


class TextRows:
    """Rows of text, in a new random order each time a group has been read through."""

    def __init__(self, streams: Mapping[str, np.ndarray], device: str, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.streams = {group: torch.from_numpy(streams[group].astype(np.int32)).to(device) for group in GROUPS}
        self.places: dict[tuple[str, int], list[int]] = {}
        self.tokens: dict[str, int] = dict.fromkeys(GROUPS, 0)

    def take(self, count: int, length: int) -> list[Tensor]:
        """So many rows ``[length + 1] i32`` of groups drawn by their shares."""
        names = self.random.choice(list(GROUP_SHARES), count, p=list(GROUP_SHARES.values()))
        return [self.next_row(str(name), length) for name in names]

    def next_row(self, group: str, length: int) -> Tensor:
        """The next row of a group."""
        stream = self.streams[group]
        places = self.places.setdefault((group, length), [])
        if not places:
            places += self.random.permutation((len(stream) - 1) // length).tolist()
        start = places.pop() * length
        self.tokens[group] += length
        return stream[start : start + length + 1]

    def epochs(self) -> dict[str, float]:
        """How often each group was read."""
        return {group: round(self.tokens[group] / len(stream), 2) for group, stream in self.streams.items()}
