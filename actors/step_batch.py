"""What a shard remembers of its sequences, and the tensors of one step that it makes of a plan."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..kernels.protocol import LogitChanges, PagedBatch, SamplingRow
from .sequence_sampler import SequenceSampler
from .step_plan import SequenceStart, Slice, StepPlan


class PlanError(Exception):
    """A plan that does not fit what the shard knows: a router's or a shard's mistake, never a client's."""


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
    """One step of one shard. T rows, one a token; S sequences.

    ids: the T tokens; -1 - r where the token is still on the device: that of row r of the step before. bounds: S + 1
    rows, sequence s has those from bounds[s] to bounds[s + 1]. lengths, pages: of each sequence, its tokens including
    these, and its pages, of `page_size` tokens. sampled: the sequences that get a token; sampled_rows: the row of each
    that is sampled; sampling: how. greedy: `SequenceSampler.greedy` of all of them. Numbers, not tensors: decode steps
    write them where their kernels read them.
    """

    ids: Sequence[int]
    bounds: Sequence[int]
    lengths: Sequence[int]
    pages: Sequence[tuple[int, ...]]
    page_size: int
    sampled: tuple[int, ...]
    sampled_rows: tuple[int, ...]
    sampling: tuple[SamplingRow, ...]
    scored: tuple[Scored, ...]
    greedy: bool

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
        here = [index for index, row in enumerate(self.sampled_rows) if low <= row < high]
        return StepBatch(
            self.ids[low:high],
            [bound - low for bound in self.bounds[begin : end + 1]],
            self.lengths[begin:end],
            self.pages[begin:end],
            self.page_size,
            tuple(self.sampled[index] for index in here),
            tuple(self.sampled_rows[index] - low for index in here),
            tuple(self.sampling[index] for index in here),
            tuple(replace(s, first_row=s.first_row - low) for s in self.scored if low <= s.first_row < high),
            self.greedy,
        )

    @cached_property
    def plain(self) -> bool:
        """Whether tokens are drawn of the logits as they are, and nothing is told but their probabilities."""
        return all(row.changes is None and not row.top_logprobs for row in self.sampling)

    @cached_property
    def tokens(self) -> Tensor:
        """[T] int64."""
        return torch.tensor(self.ids, dtype=torch.int64)

    @cached_property
    def paged(self) -> PagedBatch:
        """Where the tokens stand in the KV cache."""
        table = np.full((len(self.pages), max(map(len, self.pages), default=0)), -1, np.int32)
        for row, pages in enumerate(self.pages):
            table[row, : len(pages)] = pages
        query_start = np.array(self.bounds, np.int32)
        context_len = np.array(self.lengths, np.int32)
        new = np.diff(query_start)
        owner = np.repeat(np.arange(len(new)), new)
        # A sequence's last query stands at its last position.
        positions = np.arange(len(self.ids)) + np.repeat(context_len - query_start[1:], new)
        slots = table[owner, positions // self.page_size].astype(np.int64) * self.page_size
        slots += positions % self.page_size
        return PagedBatch(
            torch.from_numpy(query_start),
            torch.from_numpy(context_len),
            torch.from_numpy(table),
            torch.from_numpy(positions),
            torch.from_numpy(slots),
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


@dataclass
class _Sequence:
    start: SequenceStart
    sampler: SequenceSampler
    pages: tuple[int, ...] = ()
    length: int = 0
    last_token: int | None = None
    promised: int = -1
    """The step that will give the token after the last one; -1 for none."""


class SequenceTable:
    """The sequences that live on a shard. `page_size` in tokens, `num_pages` in the shard's cache."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._num_pages, self._page_size = num_pages, page_size
        self._sequences: dict[int, _Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, plan: StepPlan) -> StepBatch:
        """Takes up the plan's ends, starts and pages; returns the step's tensors. Raises `PlanError`."""
        for sequence in plan.ends:
            if self._sequences.pop(sequence, None) is None:
                raise PlanError(f"the plan ends sequence {sequence}, which is not here")
        for start in plan.starts:
            if start.sequence in self._sequences:
                raise PlanError(f"the plan starts sequence {start.sequence}, which is here already")
            self._sequences[start.sequence] = _Sequence(start, SequenceSampler(start))
        return self._batch(plan.slices)

    def can_follow(self, plan: StepPlan) -> bool:
        """Whether the plan can be applied while the tokens of the step before it are only promised: all that it needs
        of them are the tokens themselves."""
        here = (self._sequences.get(part.sequence) for part in plan.slices)
        return plan.decode_rows > 0 and all(sequence is None or sequence.sampler.greedy for sequence in here)

    def promise(self, step: int, batch: StepBatch) -> None:
        """A step's tokens are on their way: its sequences go on with what its rows will have sampled."""
        for row, number in zip(batch.sampled_rows, batch.sampled, strict=True):
            sequence = self._sequences[number]
            sequence.last_token, sequence.promised = -1 - row, step

    def sampled(self, step: int, number: int, token: int) -> None:
        """Remembers the token that a step gave a sequence, which may have gone on or ended since it was promised."""
        sequence = self._sequences.get(number)
        if sequence is None:
            return
        sequence.sampler.took(token)
        if sequence.promised in (-1, step):
            sequence.last_token, sequence.promised = token, -1

    def _batch(self, slices: tuple[Slice, ...]) -> StepBatch:
        tokens: list[int] = []
        bounds, lengths, pages = [0], [], []
        sampled, sampled_rows, sampling, scored = [], [], [], []
        for part in slices:
            sequence = self._sequences.get(part.sequence)
            if sequence is None:
                raise PlanError(f"the plan runs sequence {part.sequence}, which is not here")
            ids = self._take(sequence, part)
            if sequence.start.score_prompt and part.tokens:
                targets = part.tokens[1:] + ((part.next_token,) if part.next_token >= 0 else ())
                files = sequence.start.keep, sequence.start.compare
                scored.append(Scored(part.sequence, part.start, len(tokens), targets, *files, part.next_token < 0))
            tokens.extend(ids)
            bounds.append(len(tokens))
            lengths.append(sequence.length)
            pages.append(sequence.pages)
            if part.sample:
                sampled.append(part.sequence)
                sampled_rows.append(len(tokens) - 1)
                sampling.append(sequence.sampler.row(sequence.length))
        return StepBatch(
            tokens,
            bounds,
            lengths,
            pages,
            self._page_size,
            tuple(sampled),
            tuple(sampled_rows),
            tuple(sampling),
            tuple(scored),
            all(self._sequences[number].sampler.greedy for number in sampled),
        )

    def _take(self, sequence: _Sequence, part: Slice) -> tuple[int, ...]:
        """Moves a sequence on by a slice; returns the tokens that run."""
        ids = part.tokens
        if not ids:
            if sequence.last_token is None:
                raise PlanError(f"sequence {part.sequence} has no sampled token to go on with")
            ids = (sequence.last_token,)
        if any(not 0 <= page < self._num_pages for page in part.new_pages):
            raise PlanError(f"sequence {part.sequence} got pages {part.new_pages}, the cache has {self._num_pages}")
        end = part.start + len(ids)
        kept = -(-end // self._page_size) - len(part.new_pages)
        if part.start == sequence.length:
            fits = kept == len(sequence.pages)
        else:  # it goes on behind tokens that the prefix cache has: in whole pages, after those that it filled
            fits = part.start > sequence.length and not part.start % self._page_size
            fits = fits and 0 <= kept <= sequence.length // self._page_size
        if not fits:
            raise PlanError(
                f"sequence {part.sequence} has {sequence.length} tokens in {len(sequence.pages)} pages of "
                f"{self._page_size}; a slice of {len(ids)} from {part.start} with {len(part.new_pages)} new pages "
                "does not follow"
            )
        if part.new_pages or kept < len(sequence.pages):
            sequence.pages = sequence.pages[:kept] + part.new_pages
        sequence.length = end
        return ids
