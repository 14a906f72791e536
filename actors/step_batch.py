"""The rows of one step of a shard, and the tensors that its stages read of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from torch import Tensor

from ..kernels.protocol import Chunk, LogitChanges, PagedBatch, SamplingRow
from .page_table import PageTable
from .running_rows import RunningRows
from .sequence_sampler import SequenceSampler


@dataclass(frozen=True)
class Scored:
    """A slice whose prompt tokens are scored: row `first_row` + i of the step gives the probability of targets[i].

    keep, compare: the sequence's files of distributions, "" for none. last: the prompt ends with this slice.
    """

    sequence: int
    start: int
    first_row: int
    targets: tuple[int, ...]
    keep: str = ""
    compare: str = ""
    last: bool = False


@dataclass(frozen=True)
class StepBatch:
    """One step of one shard, until its sequences go on. T rows, one a token; S sequences; N of these get a token.
    Numbers of the host.

    numbers: [3, T] int64, of each row the token, or -1 - r where it is still on the device: that of row r of the step
    before; its position in its sequence; where in the KV cache it is written. bounds: [S + 1] int64, sequence s has the
    rows from bounds[s] to bounds[s + 1], of which the last is its last token. places: [S] int64, each one's in `pages`.
    sampled: the N sequences; sampled_rows: [N] int64, the row of each that is sampled; samplers: how. plain:
    `SequenceSampler.plain` of all of them. rows: of a step that only decodes, what stays of it for the next one.
    """

    numbers: np.ndarray
    bounds: np.ndarray
    places: np.ndarray
    pages: PageTable
    sampled: tuple[int, ...]
    sampled_rows: np.ndarray
    samplers: tuple[SequenceSampler, ...]
    scored: tuple[Scored, ...]
    plain: bool
    rows: RunningRows | None = None

    @staticmethod
    def joined(parts: Sequence[StepBatch]) -> StepBatch:
        """Steps of different sequences as one, in this order."""
        first_rows = [0, *accumulate(len(part.ids) for part in parts)]
        each = list(zip(parts, first_rows, strict=False))
        return StepBatch(
            np.concatenate([part.numbers for part in parts], axis=1),
            np.concatenate([parts[0].bounds[:1], *(part.bounds[1:] + first for part, first in each)]),
            np.concatenate([part.places for part in parts]),
            parts[0].pages,
            tuple(chain.from_iterable(part.sampled for part in parts)),
            np.concatenate([part.sampled_rows + first for part, first in each]),
            tuple(chain.from_iterable(part.samplers for part in parts)),
            tuple(replace(one, first_row=one.first_row + first) for part, first in each for one in part.scored),
            all(part.plain for part in parts),
        )

    @property
    def ids(self) -> np.ndarray:
        """[T] int64, the tokens."""
        return self.numbers[0]

    @property
    def positions(self) -> np.ndarray:
        """[T] int64."""
        return self.numbers[1]

    @property
    def slots(self) -> np.ndarray:
        """[T] int64."""
        return self.numbers[2]

    @property
    def lengths(self) -> np.ndarray:
        """[S] int64, tokens of each sequence, these included."""
        return self.positions[self.bounds[1:] - 1] + 1

    @property
    def decodes(self) -> bool:
        """Whether every row is one sequence's next token and is sampled, and nothing is scored."""
        return self.numbers.shape[1] == len(self.places) == len(self.sampled) > 0 and not self.scored

    def split(self, parts: int) -> tuple[StepBatch, ...]:
        """The step in so many parts of whole sequences, in their order, of about as many rows; some may be empty."""
        cuts = [bisect_left(self.bounds, len(self.ids) * part // parts) for part in range(parts + 1)]
        return tuple(self._part(begin, end) for begin, end in pairwise(cuts))

    def _part(self, begin: int, end: int) -> StepBatch:
        """Sequences begin..end."""
        low, high = self.bounds[begin], self.bounds[end]
        here = slice(*np.searchsorted(self.sampled_rows, (low, high)))
        return StepBatch(
            self.numbers[:, low:high],
            self.bounds[begin : end + 1] - low,
            self.places[begin:end],
            self.pages,
            self.sampled[here],
            self.sampled_rows[here] - low,
            self.samplers[here],
            tuple(replace(s, first_row=s.first_row - int(low)) for s in self.scored if low <= s.first_row < high),
            self.plain,
        )

    @property
    def sampling(self) -> tuple[SamplingRow, ...]:
        """How each of the N rows is drawn, at the position behind it."""
        positions = (self.positions[self.sampled_rows] + 1).tolist()
        return tuple(sampler.row(position) for sampler, position in zip(self.samplers, positions, strict=True))

    @property
    def tokens(self) -> Tensor:
        """[T] int64."""
        return torch.from_numpy(self.ids)

    @property
    def paged(self) -> PagedBatch:
        """Where the tokens stand in the KV cache."""
        return PagedBatch(
            torch.from_numpy(self.bounds.astype(np.int32)),
            torch.from_numpy(self.lengths.astype(np.int32)),
            torch.from_numpy(self.pages.rows(self.places)),
            torch.from_numpy(self.positions),
            torch.from_numpy(self.slots),
            self._chunks,
        )

    @property
    def _chunks(self) -> tuple[Chunk, ...]:
        if len(self.ids) == len(self.lengths):  # a row each
            return ()
        rows = np.diff(self.bounds)
        return tuple(
            Chunk(sequence, int(self.bounds[sequence]), int(rows[sequence]), int(self.lengths[sequence]))
            for sequence in np.flatnonzero(rows > 1).tolist()
        )

    def on(self, device: torch.device) -> StepInputs:
        """What the stages read, on a device; all are copied without waiting."""
        if device.type == "cpu":
            return StepInputs(self.tokens, self.paged)
        return StepInputs(_copied(self.tokens, device), self.paged.moved(lambda tensor: _copied(tensor, device)))


@dataclass(frozen=True)
class StepInputs:
    """tokens: [T] int64. paged: where they stand in the KV cache."""

    tokens: Tensor
    paged: PagedBatch


def rows_on(rows: Sequence[SamplingRow], device: torch.device) -> list[SamplingRow]:
    """The same rows with what changes their logits on a device."""
    if device.type == "cpu":
        return list(rows)
    return [row if row.changes is None else replace(row, changes=_changes_on(row.changes, device)) for row in rows]


def _changes_on(changes: LogitChanges, device: torch.device) -> LogitChanges:
    moved = {name: _copied(value, device) for name, value in vars(changes).items() if isinstance(value, Tensor)}
    return replace(changes, **moved)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory, which torch keeps until the copy is done."""
    return tensor.pin_memory().to(device, non_blocking=True)
