"""What a shard remembers of one sequence to draw its tokens: how many it has, and what penalties or a grammar ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels.protocol import LogitChanges, SamplingRow
from ..kernels.sampling import row_words
from .grammar import GrammarBook, GrammarWalk
from .step_plan import SequenceStart

_NO_TOKENS = torch.empty(0, dtype=torch.int64)
_NO_NUMBERS = torch.empty(0, dtype=torch.float64)


class TokenCounts:
    """The distinct tokens of a prompt and its answer, and how often each is in the answer."""

    def __init__(self, prompt: Sequence[int] = (), generated: Sequence[int] = ()) -> None:
        counts = Counter(generated)
        distinct = dict.fromkeys((*prompt, *generated))
        self._places = {token: place for place, token in enumerate(distinct)}
        self._tokens = np.array([*distinct], dtype=np.int64)
        self._counts = np.array([counts[token] for token in distinct], dtype=np.float64)

    def add(self, token: int) -> None:
        """Takes up a generated token."""
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            if place == len(self._tokens):
                self._tokens = np.resize(self._tokens, 2 * place + 16)
                self._counts = np.resize(self._counts, 2 * place + 16)
            self._tokens[place], self._counts[place] = token, 0.0
        self._counts[place] += 1.0

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The tokens [n] int64 and their counts [n] float64, both valid until the next `add`."""
        size = len(self._places)
        return torch.from_numpy(self._tokens[:size]), torch.from_numpy(self._counts[:size])


class SequenceSampler:
    """Makes the `SamplingRow` of a sequence's next token. A sequence without changes of its logits keeps no counts.

    grammars: of the shard; without them a sequence with a grammar is refused with a ValueError.

    plain: whether every token is drawn of the logits as they are, whatever the tokens before, and nothing is told but
    its probability: how it is drawn is then known before the token in front of it. words: `kernels.sampling.row_words`;
    seed: 64 bits. top_logprobs: as in `Sampling`.
    """

    def __init__(self, start: SequenceStart, grammars: GrammarBook | None = None) -> None:
        how = self._how = start.sampling
        self._generated = start.generated
        self._counts: TokenCounts | None = None
        border = len(start.history) - start.generated
        if how.penalizes:
            self._counts = TokenCounts(start.history[:border], start.history[border:])
        self._walk: GrammarWalk | None = None
        if how.grammar:
            if grammars is None:
                raise ValueError("the sequence has a grammar, but this shard knows no vocabulary")
            self._walk = grammars.walk(how.grammar, how.grammar_ends, start.history[border:])
        self._bias_tokens, self._bias = _NO_TOKENS, _NO_NUMBERS
        if how.logit_bias:
            self._bias_tokens = torch.tensor([token for token, _ in how.logit_bias], dtype=torch.int64)
            self._bias = torch.tensor([bias for _, bias in how.logit_bias], dtype=torch.float64)
        self._ban = torch.tensor(how.stop_ban, dtype=torch.int64)
        self.words = row_words(how.temperature, how.top_p, how.min_p, how.top_k)
        self.seed = how.seed & (1 << 64) - 1
        self.top_logprobs = how.top_logprobs
        changes = self._counts is not None or how.logit_bias or how.stop_ban or self._walk is not None
        self.plain = not (changes or how.top_logprobs)

    @property
    def fault(self) -> str:
        """Why the token that was drawn last does not count, or ""."""
        return "" if self._walk is None else self._walk.fault

    def took(self, token: int) -> None:
        """The sequence goes on with this token."""
        self._generated += 1
        if self._counts is not None:
            self._counts.add(token)
        if self._walk is not None:
            self._walk.took(token)

    def row(self, position: int) -> SamplingRow:
        """How the token at `position` is drawn."""
        how = self._how
        row = how.temperature, how.top_p, how.top_k, how.seed, position, how.min_p, how.top_logprobs
        return SamplingRow(*row, self._changes())

    def _changes(self) -> LogitChanges | None:
        how = self._how
        bans = bool(how.stop_ban) and self._generated < how.min_tokens
        allowed = None if self._walk is None else self._walk.allowed()
        if self._counts is None and not how.logit_bias and not bans and allowed is None:
            return None
        seen, counts = self._counts.tensors() if self._counts is not None else (_NO_TOKENS, _NO_NUMBERS)
        banned = self._ban if bans else _NO_TOKENS
        penalties = how.repetition_penalty, how.presence_penalty, how.frequency_penalty
        return LogitChanges(self._bias_tokens, self._bias, seen, counts, banned, *penalties, allowed)
