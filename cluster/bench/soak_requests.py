"""Random requests for a soak: of all lengths, alike and different, greedy and drawn in every way there is."""

from __future__ import annotations

import random

from ...actors.request import Generate
from ...actors.step_plan import Sampling

PAGE = 8
# In pages: the longest prompt with its answer, and what all prompts of a kind share.
LONGEST, _SHARED = 16, 5
_GREEDY = Sampling(0.0, 1.0, 0, 0)


class RandomRequests:
    """Draws requests. vocabulary: tokens are below it."""

    def __init__(self, draw: random.Random, vocabulary: int) -> None:
        self._random, self._vocabulary = draw, vocabulary
        longest = [self._tokens(_SHARED * PAGE) for _ in range(3)]
        self._beginnings = [tuple(tokens[: draw.randint(PAGE, len(tokens))]) for tokens in longest]
        self._prompts: list[tuple[int, ...]] = []

    def draw(self, name: str) -> Generate:
        """Half of them greedy, a quarter drawn from a seed, a quarter with penalties, bias and bans besides. A tenth
        also wants its prompt's log probabilities."""
        prompt = self._prompt()
        self._prompts.append(prompt)
        most = self._random.randint(1, LONGEST * PAGE - len(prompt))
        stops = self._tokens(1)
        kind = self._random.random()
        sampling = _GREEDY if kind < 0.5 else self._drawn() if kind < 0.75 else self._everything(prompt, most, stops)
        scored = self._random.random() < 0.1
        return Generate(name, prompt, most, sampling, stops, self._random.randint(0, 1), scored)

    def _prompt(self) -> tuple[int, ...]:
        """A quarter have the prompt of an earlier one, as several choices of one question do; of the others half begin
        as others do."""
        if self._prompts and self._random.random() < 0.25:
            return self._random.choice(self._prompts)
        beginning = self._random.choice(self._beginnings) if self._random.random() < 0.5 else ()
        room = LONGEST * PAGE - len(beginning)
        return beginning + self._tokens(self._random.randint(1, room // 2))

    def _drawn(self) -> Sampling:
        return Sampling(1.0, 0.95, 0, self._random.randrange(1 << 31))

    def _everything(self, prompt: tuple[int, ...], most: int, stops: tuple[int, ...]) -> Sampling:
        some = self._random
        return Sampling(
            temperature=some.choice((0.0, 0.7, 1.5)),
            top_p=some.choice((0.5, 1.0)),
            top_k=some.choice((0, 5)),
            seed=some.randrange(1 << 31),
            min_p=some.choice((0.0, 0.02)),
            presence_penalty=some.uniform(-1.0, 1.0),
            frequency_penalty=some.uniform(-1.0, 1.0),
            repetition_penalty=some.uniform(0.8, 1.3),
            logit_bias=((some.choice(prompt), some.uniform(-5.0, 5.0)),),
            min_tokens=some.randint(0, most),
            stop_ban=stops,
            top_logprobs=some.randint(0, 3),
        )

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._vocabulary) for _ in range(count))
