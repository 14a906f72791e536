"""What a shard remembers of its sequences: arrays by a sequence's place, so that many cost little more than one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .sequence_sampler import SequenceSampler
from .step_batch import Scored, StepBatch
from .step_plan import Decodes, NewTokens, SequenceStart, Slice, StepPlan

_NO_TOKEN = np.iinfo(np.int64).min


class PlanError(Exception):
    """A plan that does not fit what the shard knows: a router's or a shard's mistake, never a client's."""


@dataclass
class _Sequence:
    start: SequenceStart
    sampler: SequenceSampler
    place: int


@dataclass(frozen=True)
class _Group:
    """Sequences that run together, mostly step after step. places: -1 for one that is not here. plain: all are.
    bounds: of a step in which each has a row."""

    sequences: tuple[int, ...]
    places: np.ndarray
    samplers: tuple[SequenceSampler, ...]
    plain: bool
    bounds: np.ndarray


_NOBODY = _Group((), np.empty(0, np.int64), (), True, np.zeros(1, np.int64))


class SequenceTable:
    """The sequences that live on a shard. `page_size` in tokens, `num_pages` in the shard's cache.

    A sequence has a place as long as it lives. Arrays by place: how many tokens it has; the last of them, the next to
    run (-1 - r while it is only promised, r its row in the step that will give it); the last step that promised one, or
    -1; how many pages it has, and which, behind them -1.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._num_pages, self._page_size = num_pages, page_size
        self._sequences: dict[int, _Sequence] = {}
        self._free: list[int] = []
        self._put_state(np.empty((4, 0), np.int64))
        self._pages = np.empty((0, 0), np.int32)
        self._newest = -1
        """The last step that has promised tokens."""
        self._group = _NOBODY

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, plan: StepPlan) -> StepBatch:
        """Takes up the plan's ends, starts and pages; returns the step's rows. Raises `PlanError`."""
        for number in plan.ends:
            self._end(number)
        for start in plan.starts:
            self._start(start)
        decoding = self._decode(plan.decodes)
        return StepBatch.joined([decoding, *map(self._take, plan.slices)]) if plan.slices else decoding

    def can_follow(self, plan: StepPlan) -> bool:
        """Whether the plan can be applied while the tokens of the step before it are only promised: all that it needs
        of them are the tokens themselves."""
        return plan.decode_rows > 0 and self._grouped(plan.decodes.sequences).plain

    def promise(self, step: int, batch: StepBatch) -> None:
        """A step's tokens are on their way: its sequences go on with what its rows will have sampled."""
        places = self._grouped(batch.sampled).places
        self._last[places], self._promised[places], self._newest = -1 - batch.sampled_rows, step, step

    def sampled(self, step: int, tokens: NewTokens) -> None:
        """Remembers the tokens that a step gave its sequences, which may have gone on or ended since they were
        promised."""
        group = self._grouped(tokens.sequences)
        if not group.plain:
            for number, token in zip(tokens.sequences, tokens.tokens, strict=True):
                if number in self._sequences:
                    self._sequences[number].sampler.took(token)
        if self._newest <= step and len(group.samplers) == len(tokens.sequences):
            self._last[group.places] = tokens.tokens
        else:
            due = (group.places >= 0) & (self._promised[group.places] <= step)
            self._last[group.places[due]] = np.array(tokens.tokens, np.int64)[due]

    def _end(self, number: int) -> None:
        sequence = self._sequences.pop(number, None)
        if sequence is None:
            raise PlanError(f"the plan ends sequence {number}, which is not here")
        self._free.append(sequence.place)
        self._group = _NOBODY

    def _start(self, start: SequenceStart) -> None:
        number = start.sequence
        if number in self._sequences:
            raise PlanError(f"the plan starts sequence {number}, which is here already")
        if not self._free:
            self._add_places()
        place = self._free.pop()
        self._sequences[number] = _Sequence(start, SequenceSampler(start), place)
        self._state[:, place] = 0, _NO_TOKEN, -1, 0
        self._pages[place] = -1
        self._group = _NOBODY

    def _add_places(self) -> None:
        """Twice as many."""
        here = len(self._lengths)
        room = max(16, 2 * here)
        self._put_state(np.pad(self._state, ((0, 0), (0, room - here))))
        self._pages = _padded(self._pages, room, self._pages.shape[1])
        self._free.extend(range(room - 1, here - 1, -1))

    def _put_state(self, state: np.ndarray) -> None:
        """One array, of which each column is a place, so that a step needs to look places up once."""
        self._state = state
        self._lengths, self._last, self._promised, self._counts = state

    def _grouped(self, numbers: tuple[int, ...]) -> _Group:
        """These sequences' places and samplers; remembered, for the next step is mostly of the same ones."""
        if numbers != self._group.sequences:
            here = [self._sequences.get(number) for number in numbers]
            places = np.array([-1 if each is None else each.place for each in here], np.int64)
            samplers = tuple(each.sampler for each in here if each is not None)
            plain = all(sampler.plain for sampler in samplers)
            self._group = _Group(numbers, places, samplers, plain, np.arange(len(numbers) + 1))
        return self._group

    def _decode(self, decodes: Decodes) -> StepBatch:
        """Moves sequences on by the token that each sampled last."""
        numbers, rows, size = decodes.sequences, len(decodes.sequences), self._page_size
        if len(decodes.starts) != rows or len(decodes.page_rows) != len(decodes.new_pages) or len({*numbers}) != rows:
            raise PlanError(f"the plan's decodes do not fit each other: {decodes}")
        group = self._grouped(numbers)
        places = group.places
        if len(group.samplers) != rows:
            raise PlanError(f"the plan runs sequence {numbers[int(places.argmin())]}, which is not here")
        for row, page in zip(decodes.page_rows, decodes.new_pages, strict=True):
            if not 0 <= row < rows:
                raise PlanError(f"the plan's decodes have a page for row {row}, they have {rows}")
            self._put_pages(numbers[row], places[row], int(self._counts[places[row]]), (page,))
        lengths, ids, _, counts = self._state.take(places, axis=1)
        room = lengths // size + 1 - counts
        if tuple(lengths.tolist()) != decodes.starts or room.any():
            row = int(((lengths != decodes.starts) | (room != 0)).argmax())
            raise self._misfit(numbers[row], places[row], 1, decodes.starts[row], decodes.page_rows.count(row))
        if rows and ids.min() == _NO_TOKEN:
            raise PlanError(f"sequence {numbers[int(ids.argmin())]} has no sampled token to go on with")
        lengths = self._lengths[places] = lengths + 1
        table = self._pages[:, : counts.max(initial=0)].take(places, axis=0)
        rows_of = group.bounds, lengths, table, size, numbers, group.bounds[:-1]
        return StepBatch(ids, *rows_of, group.samplers, (), group.plain)

    def _take(self, part: Slice) -> StepBatch:
        """Moves one sequence on by a slice."""
        number, size = part.sequence, self._page_size
        sequence = self._sequences.get(number)
        if sequence is None:
            raise PlanError(f"the plan runs sequence {number}, which is not here")
        if not part.tokens:
            raise PlanError(f"sequence {number} got a slice without tokens")
        place, start, count = sequence.place, sequence.start, len(part.tokens)
        end, length = part.start + count, int(self._lengths[place])
        kept = -(-end // size) - len(part.new_pages)
        if part.start == length:
            fits = kept == self._counts[place]
        else:  # it goes on behind tokens that the prefix cache has: in whole pages, after those that it filled
            fits = part.start > length and not part.start % size and 0 <= kept <= length // size
        if not fits:
            raise self._misfit(number, place, count, part.start, len(part.new_pages))
        self._put_pages(number, place, kept, part.new_pages)
        self._lengths[place] = end
        scored: tuple[Scored, ...] = ()
        if start.score_prompt:
            targets = part.tokens[1:] + ((part.next_token,) if part.next_token >= 0 else ())
            scored = (Scored(number, part.start, 0, targets, start.keep, start.compare, part.next_token < 0),)
        return StepBatch(
            np.array(part.tokens, np.int64),
            np.array((0, count)),
            np.array((end,)),
            self._pages[place, None, : self._counts[place]].copy(),
            size,
            (number,) if part.sample else (),
            np.array((count - 1,) if part.sample else (), np.int64),
            (sequence.sampler,) if part.sample else (),
            scored,
            sequence.sampler.plain or not part.sample,
        )

    def _put_pages(self, number: int, place: int, kept: int, pages: tuple[int, ...]) -> None:
        """From the page `kept` on, a sequence has these, and none behind them."""
        if any(not 0 <= page < self._num_pages for page in pages):
            raise PlanError(f"sequence {number} got pages {pages}, the cache has {self._num_pages}")
        count = kept + len(pages)
        if count > self._pages.shape[1]:
            self._pages = _padded(self._pages, self._pages.shape[0], 2 * count)
        self._pages[place, kept:count], self._pages[place, count : self._counts[place]] = pages, -1
        self._counts[place] = count

    def _misfit(self, number: int, place: int, count: int, start: int, new_pages: int) -> PlanError:
        return PlanError(
            f"sequence {number} has {self._lengths[place]} tokens in {self._counts[place]} pages of {self._page_size}; "
            f"a slice of {count} from {start} with {new_pages} new pages does not follow"
        )


def _padded(pages: np.ndarray, rows: int, width: int) -> np.ndarray:
    """The same page tables with room for more; what is new is -1."""
    wider = np.full((rows, width), -1, np.int32)
    wider[: pages.shape[0], : pages.shape[1]] = pages
    return wider
