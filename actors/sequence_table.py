"""What a shard remembers of its sequences, and the rows of each step: many cost little more than one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .grammar import GrammarBook
from .page_table import PageTable
from .running_rows import NO_TOKEN, RunningRows
from .sequence_sampler import SequenceSampler
from .step_batch import Scored, StepBatch
from .step_plan import Decodes, NewTokens, SequenceStart, Slice, StepPlan


class PlanError(Exception):
    """A plan that does not fit what the shard knows: a router's or a shard's mistake, never a client's."""


@dataclass
class _Sequence:
    start: SequenceStart
    sampler: SequenceSampler
    place: int


class SequenceTable:
    """The sequences that live on a shard. `page_size` in tokens, `num_pages` in the shard's cache; grammars: what those
    of them are compiled by that have one.

    A sequence has a place as long as it lives, by which its pages are kept. State by place, [3, places] int64: how many
    tokens it has; the last of them, the next to run, as in `RunningRows.numbers`; the last step that promised one, or
    -1. For those that decode together the `RunningRows` know better, until others do.
    """

    def __init__(self, num_pages: int, page_size: int, grammars: GrammarBook | None = None) -> None:
        self._num_pages, self._page_size, self._grammars = num_pages, page_size, grammars
        self._sequences: dict[int, _Sequence] = {}
        self._free: list[int] = []
        self._pages = PageTable(page_size)
        self._state = np.empty((3, 0), np.int64)
        self._nobody = self._rows = self._gathered(())
        self._decoding = self._batch(self._nobody)

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, plan: StepPlan) -> StepBatch:
        """Takes up the plan's ends, starts and pages; returns the step's rows, which are valid until the next one is
        applied. Raises `PlanError`."""
        for number in plan.ends:
            self._end(number)
        for start in plan.starts:
            self._start(start)
        decoding = self._decode(plan.decodes)
        return StepBatch.joined([decoding, *map(self._take, plan.slices)]) if plan.slices else decoding

    def can_follow(self, plan: StepPlan) -> bool:
        """Whether the plan can be applied while the tokens of the step before it are only promised: all that it needs
        of them are the tokens themselves."""
        numbers = plan.decodes.sequences
        if numbers == self._rows.sequences:
            return plan.decode_rows > 0 and self._rows.plain
        known = (self._sequences.get(number) for number in numbers)
        return plan.decode_rows > 0 and all(each is None or each.sampler.plain for each in known)

    def promise(self, step: int, batch: StepBatch) -> None:
        """A step's tokens are on their way: its sequences go on with what its rows will have sampled."""
        if batch.rows is self._rows:
            self._rows.promise(step, batch.sampled_rows)
            return
        self._scatter()
        places = self._places(batch.sampled)
        self._state[1:, places] = -1 - batch.sampled_rows, np.full(len(places), step)

    def sampled(self, step: int, tokens: NewTokens) -> None:
        """Remembers the tokens that a step gave its sequences, which may have gone on or ended since they were
        promised."""
        rows, numbers = self._rows, tokens.sequences
        if numbers != rows.sequences:
            self._scatter()
            self._put_tokens(step, numbers, tokens.tokens)
        else:
            rows.told(step, tokens.tokens)
            if rows.plain:
                return
        for number, token in zip(numbers, tokens.tokens, strict=True):
            if number in self._sequences:
                self._sequences[number].sampler.took(token)

    def _end(self, number: int) -> None:
        self._scatter()
        sequence = self._sequences.pop(number, None)
        if sequence is None:
            raise PlanError(f"the plan ends sequence {number}, which is not here")
        self._free.append(sequence.place)

    def _start(self, start: SequenceStart) -> None:
        self._scatter()
        number = start.sequence
        if number in self._sequences:
            raise PlanError(f"the plan starts sequence {number}, which is here already")
        if not self._free:
            self._add_places()
        place = self._free.pop()
        self._sequences[number] = _Sequence(start, SequenceSampler(start, self._grammars), place)
        self._state[:, place] = 0, NO_TOKEN, -1
        self._pages.clear(place)

    def _add_places(self) -> None:
        """Twice as many."""
        here = self._state.shape[1]
        room = max(16, 2 * here)
        self._state = np.pad(self._state, ((0, 0), (0, room - here)))
        self._pages.add_places(room)
        self._free.extend(range(room - 1, here - 1, -1))

    def _places(self, numbers: Sequence[int]) -> np.ndarray:
        """[S] int64, those of sequences that are here."""
        return np.array([self._sequences[number].place for number in numbers], np.int64)

    def _gathered(self, numbers: tuple[int, ...]) -> RunningRows:
        """These sequences as rows. Raises `PlanError`."""
        missing = [number for number in numbers if number not in self._sequences]
        if missing:
            raise PlanError(f"the plan runs sequence {missing[0]}, which is not here")
        places, samplers = self._places(numbers), tuple(self._sequences[number].sampler for number in numbers)
        lengths, tokens, promised = self._state.take(places, axis=1)
        if not lengths.all():
            raise PlanError(f"sequence {numbers[int(lengths.argmin())]} has no sampled token to go on with")
        slots = self._pages.slots(places, lengths - 1) if numbers else lengths
        return RunningRows(numbers, places, samplers, np.stack((tokens, lengths - 1, slots)), promised, self._page_size)

    def _scatter(self) -> None:
        """Others may go on than those that ran last."""
        rows, self._rows = self._rows, self._nobody
        if rows.sequences:
            self._state[:, rows.places] = rows.positions + 1, rows.tokens, rows.promised

    def _put_tokens(self, step: int, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        """Where the sequence is here, and no later step has promised a token."""
        for number, token in zip(numbers, tokens, strict=True):
            sequence = self._sequences.get(number)
            if sequence is not None and self._state[2, sequence.place] <= step:
                self._state[1, sequence.place] = token

    def _decode(self, decodes: Decodes) -> StepBatch:
        """Moves sequences on by the token that each sampled last."""
        numbers, starts, gaining = decodes.sequences, decodes.starts, decodes.page_rows
        if len(starts) != len(numbers) or len(gaining) != len(decodes.new_pages):
            raise PlanError(f"the plan's decodes do not fit each other: {decodes}")
        if numbers != self._rows.sequences:
            if len({*numbers}) != len(numbers):
                raise PlanError(f"the plan's decodes do not fit each other: {decodes}")
            self._scatter()
            self._rows = self._gathered(numbers)
        rows = self._rows
        needing = rows.advance()
        if gaining:
            self._check_pages(decodes)
        if tuple(rows.positions.tolist()) != starts or needing != gaining:
            raise self._decode_misfit(rows, decodes, needing)
        if not rows.take_tokens():
            raise PlanError(f"sequence {numbers[int(rows.tokens.argmin())]} has no sampled token to go on with")
        if gaining:
            rows.gain(gaining, decodes.new_pages)
            for row, page in rows.gained:
                self._pages.put(rows.places[row], starts[row] // self._page_size, (page,))
        if self._decoding.rows is not rows:
            self._decoding = self._batch(rows)
        return self._decoding

    def _batch(self, rows: RunningRows) -> StepBatch:
        """The same for all steps of these rows, whose numbers change in their place."""
        each = rows.numbers, rows.bounds, rows.places, self._pages, rows.sequences, rows.bounds[:-1]
        return StepBatch(*each, rows.samplers, (), rows.plain, rows)

    def _check_pages(self, decodes: Decodes) -> None:
        rows = len(decodes.sequences)
        for row, page in zip(decodes.page_rows, decodes.new_pages, strict=True):
            if not 0 <= row < rows:
                raise PlanError(f"the plan's decodes have a page for row {row}, they have {rows}")
            self._check_range(decodes.sequences[row], (page,))

    def _decode_misfit(self, rows: RunningRows, decodes: Decodes, needing: tuple[int, ...]) -> PlanError:
        unlike = [row for row, start in enumerate(decodes.starts) if start != rows.positions[row]]
        row = min([*unlike, *{*needing}.symmetric_difference(decodes.page_rows)], default=0)
        new, length = decodes.page_rows.count(row), int(rows.positions[row])
        return self._misfit(decodes.sequences[row], rows.places[row], length, 1, decodes.starts[row], new)

    def _take(self, part: Slice) -> StepBatch:
        """Moves one sequence on by a slice."""
        number, size = part.sequence, self._page_size
        sequence = self._sequences.get(number)
        if sequence is None:
            raise PlanError(f"the plan runs sequence {number}, which is not here")
        if not part.tokens:
            raise PlanError(f"sequence {number} got a slice without tokens")
        place, start, count = sequence.place, sequence.start, len(part.tokens)
        end, length = part.start + count, int(self._state[0, place])
        kept = -(-end // size) - len(part.new_pages)
        if part.start == length:
            fits = kept == self._pages.counts[place]
        else:  # it goes on behind tokens that the prefix cache has: in whole pages, after those that it filled
            fits = part.start > length and not part.start % size and 0 <= kept <= length // size
        if not fits:
            raise self._misfit(number, place, length, count, part.start, len(part.new_pages))
        self._check_range(number, part.new_pages)
        self._pages.put(place, kept, part.new_pages)
        self._state[0, place] = end
        scored: tuple[Scored, ...] = ()
        if start.score_prompt:
            targets = part.tokens[1:] + ((part.next_token,) if part.next_token >= 0 else ())
            scored = (Scored(number, part.start, 0, targets, start.keep, start.compare, part.next_token < 0),)
        positions, places = np.arange(part.start, end), np.array((place,))
        return StepBatch(
            np.stack((np.array(part.tokens, np.int64), positions, self._pages.slots(places, positions))),
            np.array((0, count)),
            places,
            self._pages,
            (number,) if part.sample else (),
            np.array((count - 1,) if part.sample else (), np.int64),
            (sequence.sampler,) if part.sample else (),
            scored,
            sequence.sampler.plain or not part.sample,
        )

    def _check_range(self, number: int, pages: tuple[int, ...]) -> None:
        if any(not 0 <= page < self._num_pages for page in pages):
            raise PlanError(f"sequence {number} got pages {pages}, the cache has {self._num_pages}")

    def _misfit(self, number: int, place: int, length: int, count: int, start: int, new_pages: int) -> PlanError:
        return PlanError(
            f"sequence {number} has {length} tokens in {self._pages.counts[place]} pages of {self._page_size}; "
            f"a slice of {count} from {start} with {new_pages} new pages does not follow"
        )
