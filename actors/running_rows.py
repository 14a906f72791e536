"""Sequences that decode together, mostly step after step: columns that stay, and go on by a token a step.

What a step costs is a few operations on whole columns: between two steps this code is cold, and so is all that it
calls, so that the number of calls counts for few rows and the length of the columns for many.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..kernels.sampling import WORDS, uniforms
from .sequence_sampler import SequenceSampler

NO_TOKEN = np.iinfo(np.int64).min


class RunningRows:
    """R sequences, a row each, in the order of the plan.

    places: [R] int64, each one's on the shard. numbers: [3, R] int64: the token to run, or NO_TOKEN, or -1 - r where it
    is only promised, r its row in the step that will give it; its position; where in the KV cache it is written.
    promised: [R] int64, the last step that promised the token, or -1. plain: `SequenceSampler.plain` of all; draws:
    whether any is drawn by chance. turn: counts `advance`; gained: (row, page) of those that got a page in the last.
    """

    def __init__(
        self,
        sequences: tuple[int, ...],
        places: np.ndarray,
        samplers: tuple[SequenceSampler, ...],
        numbers: np.ndarray,
        promised: np.ndarray,
        page_size: int,
    ) -> None:
        """numbers: the next tokens, but the positions and slots of those that each has run last."""
        self.sequences, self.places, self.samplers, self.numbers = sequences, places, samplers, numbers
        self.tokens, self.positions, self.slots = numbers
        self._moving = numbers[1:]
        self.promised = promised
        self.bounds = np.arange(len(sequences) + 1)
        self.plain = all(sampler.plain for sampler in samplers)
        self.draws = any(sampler.words[0] > 0.0 for sampler in samplers)
        self.turn = 0
        self.gained: tuple[tuple[int, int], ...] = ()
        self._page_size = page_size
        self._spare = 0
        """Steps that no row needs a page for, beside the last one."""
        self._newest = int(self.promised.max(initial=-1))
        self._told = not sequences or int(self.tokens.min()) != NO_TOKEN
        self._words: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def advance(self) -> tuple[int, ...]:
        """Every row goes on to its next token; returns those whose token begins a page, of which `gain` must tell."""
        self._moving += 1
        self.turn += 1
        self.gained = ()
        if self._spare:
            self._spare -= 1
            return ()
        offsets = self.positions % self._page_size
        self._spare = self._page_size - 1 - int(offsets.max(initial=0))
        return tuple((offsets == 0).nonzero()[0].tolist())

    def gain(self, rows: Sequence[int], pages: Sequence[int]) -> None:
        """These rows' tokens are the first of these pages."""
        self.gained = tuple(zip(rows, pages, strict=True))
        for row, page in self.gained:
            self.slots[row] = page * self._page_size

    def take_tokens(self) -> bool:
        """Whether every row knows its token, told or promised since it ran last; from now on none does."""
        told, self._told = self._told, not self.sequences
        return told

    def promise(self, step: int, rows: np.ndarray) -> None:
        """The next tokens are on their way: what `rows`, [R] int64, of a step will have sampled."""
        np.subtract(-1, rows, out=self.tokens)
        self.promised.fill(step)
        self._newest, self._told = step, True

    def told(self, step: int, tokens: Sequence[int]) -> None:
        """The tokens that a step sampled, which counts where no later one has promised any."""
        self._told = True
        if self._newest <= step:
            self.tokens[:] = tokens
        else:
            due = self.promised <= step
            self.tokens[due] = np.array(tokens, np.int64)[due]

    def words(self) -> np.ndarray:
        """[R, WORDS] float64, how each row of a plain step is drawn; valid until the next call."""
        if self._words is None:
            self._words = np.array([sampler.words for sampler in self.samplers]).reshape(-1, WORDS)
            self._seeds = np.array([sampler.seed for sampler in self.samplers], np.uint64)
        if self.draws:
            self._words[:, 3] = uniforms(self._seeds, self.positions + 1)
        return self._words
