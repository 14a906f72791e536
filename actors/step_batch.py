"""The rows of one step of a shard, and the tensors that its stages read of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from torch import Tensor

from ..kernels.protocol import LogitChanges, PagedBatch, SamplingRow
from ..kernels.sampling import WORDS, uniforms
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
    """One step of one shard. T rows, one a token; S sequences; N of these get a token. Numbers of the host.

    ids: [T] int64, the tokens; -1 - r where the token is still on the device: that of row r of the step before. bounds:
    [S + 1] int64, sequence s has the rows from bounds[s] to bounds[s + 1]. lengths: [S] int64, tokens of each sequence,
    these included. table: [S, W] int32, each one's pages, of `page_size` tokens, behind them -1. sampled: the N
    sequences; sampled_rows: [N] int64, the row of each that is sampled; samplers: how. plain: `SequenceSampler.plain`
    of all of them.
    """

    ids: np.ndarray
    bounds: np.ndarray
    lengths: np.ndarray
    table: np.ndarray
    page_size: int
    sampled: tuple[int, ...]
    sampled_rows: np.ndarray
    samplers: tuple[SequenceSampler, ...]
    scored: tuple[Scored, ...]
    plain: bool

    @staticmethod
    def joined(parts: Sequence[StepBatch]) -> StepBatch:
        """Steps of different sequences as one, in this order."""
        first_rows = [0, *accumulate(len(part.ids) for part in parts)]
        width = max(part.table.shape[1] for part in parts)
        tables = [np.pad(part.table, ((0, 0), (0, width - part.table.shape[1])), constant_values=-1) for part in parts]
        each = list(zip(parts, first_rows, strict=False))
        return StepBatch(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([parts[0].bounds[:1], *(part.bounds[1:] + first for part, first in each)]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate(tables),
            parts[0].page_size,
            tuple(chain.from_iterable(part.sampled for part in parts)),
            np.concatenate([part.sampled_rows + first for part, first in each]),
            tuple(chain.from_iterable(part.samplers for part in parts)),
            tuple(replace(one, first_row=one.first_row + first) for part, first in each for one in part.scored),
            all(part.plain for part in parts),
        )

    @property
    def decodes(self) -> bool:
        """Whether every row is one sequence's next token and is sampled, and nothing is scored."""
        return len(self.ids) == len(self.lengths) == len(self.sampled) > 0 and not self.scored

    def split(self, parts: int) -> tuple[StepBatch, ...]:
        """The step in so many parts of whole sequences, in their order, of about as many rows; some may be empty."""
        cuts = [bisect_left(self.bounds, len(self.ids) * part // parts) for part in range(parts + 1)]
        return tuple(self._part(begin, end) for begin, end in pairwise(cuts))

    def _part(self, begin: int, end: int) -> StepBatch:
        """Sequences begin..end."""
        low, high = self.bounds[begin], self.bounds[end]
        here = slice(*np.searchsorted(self.sampled_rows, (low, high)))
        return StepBatch(
            self.ids[low:high],
            self.bounds[begin : end + 1] - low,
            self.lengths[begin:end],
            self.table[begin:end],
            self.page_size,
            self.sampled[here],
            self.sampled_rows[here] - low,
            self.samplers[here],
            tuple(replace(s, first_row=s.first_row - int(low)) for s in self.scored if low <= s.first_row < high),
            self.plain,
        )

    @cached_property
    def sampling(self) -> tuple[SamplingRow, ...]:
        """How each of the N rows is drawn, at the position behind it; to be asked before its sequence goes on."""
        positions = (self.positions[self.sampled_rows] + 1).tolist()
        return tuple(sampler.row(position) for sampler, position in zip(self.samplers, positions, strict=True))

    @cached_property
    def words(self) -> np.ndarray:
        """[N, WORDS] float64, how each of the rows of a plain step is drawn."""
        words = np.array([sampler.words for sampler in self.samplers]).reshape(-1, WORDS)
        if words[:, 0].any():
            seeds = np.array([sampler.seed for sampler in self.samplers], np.uint64)
            words[:, 3] = uniforms(seeds, self.positions[self.sampled_rows] + 1)
        return words

    @cached_property
    def positions(self) -> np.ndarray:
        """[T] int64, of each token in its sequence, whose last row is its last token."""
        if len(self.ids) == len(self.lengths):  # a row each
            return self.lengths - 1
        new = np.diff(self.bounds)
        return np.arange(len(self.ids)) + np.repeat(self.lengths - self.bounds[1:], new)

    @cached_property
    def slots(self) -> np.ndarray:
        """[T] int64, where in the KV cache each token is written."""
        owner = self.bounds[:-1]
        if len(self.ids) != len(self.lengths):
            owner = np.repeat(np.arange(len(self.lengths)), np.diff(self.bounds))
        pages, offsets = np.divmod(self.positions, self.page_size)
        return self.table[owner, pages].astype(np.int64) * self.page_size + offsets

    @cached_property
    def tokens(self) -> Tensor:
        """[T] int64."""
        return torch.from_numpy(self.ids)

    @cached_property
    def paged(self) -> PagedBatch:
        """Where the tokens stand in the KV cache."""
        return PagedBatch(
            torch.from_numpy(self.bounds.astype(np.int32)),
            torch.from_numpy(self.lengths.astype(np.int32)),
            torch.from_numpy(self.table),
            torch.from_numpy(self.positions),
            torch.from_numpy(self.slots),
        )

    def on(self, device: torch.device) -> StepInputs:
        """What the stages read, on a device; all are copied without waiting."""
        if device.type == "cpu":
            return StepInputs(self.tokens, self.paged)
        paged = PagedBatch(**{name: _copied(tensor, device) for name, tensor in vars(self.paged).items()})
        return StepInputs(_copied(self.tokens, device), paged)


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
