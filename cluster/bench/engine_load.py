"""Requests that measure a running engine: decoding at a batch size, and prefill of one prompt."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...actors.request import Generate
from ...actors.step_plan import Sampling
from ..engine import EngineClient
from .rounds import BenchError, Round, Sizes

GREEDY = Sampling(0.0, 1.0, 0, 0)
# Steps after the last sequence's first token that are not counted: the pipeline of steps fills in them.
SETTLING = 2


@dataclass(frozen=True)
class DecodeRun:
    """tokens_s: of all sequences together, while all of them run. step_s: median time between two steps. texts: prompt
    and answer of each sequence."""

    tokens_s: float
    step_s: float
    texts: tuple[tuple[int, ...], ...]


class EngineLoad:
    """Measures one engine through a client. Prompts are random and each differs, so that no cached prefix helps."""

    def __init__(self, client: EngineClient, vocabulary: int, seed: int = 0) -> None:
        self._client, self._vocabulary = client, vocabulary
        self._random = random.Random(seed)
        self._names = itertools.count()

    async def measure(self, sizes: Sizes) -> Round:
        runs = {batch: await self.decode(batch, sizes.prefill, sizes.decode) for batch in sizes.batches}
        return Round(
            {batch: run.tokens_s for batch, run in runs.items()},
            await self.prefill(sizes.prefill),
            {batch: 1000 * run.step_s for batch, run in runs.items()},
            {batch: run.texts for batch, run in runs.items()},
        )

    async def decode(self, batch: int, prompt: int, tokens: int) -> DecodeRun:
        """Decodes `batch` sequences at once, `tokens` tokens each, after prompts of `prompt` tokens.

        Raises BenchError when the engine fails, or so few tokens leave nothing to measure.
        """
        requests = [self._request(prompt, tokens) for _ in range(batch)]
        answers = await asyncio.gather(*map(self._run, requests))
        times = [[moment for moment, _ in answer] for answer in answers]
        texts = tuple(
            (*request.prompt, *(token for _, token in answer))
            for request, answer in zip(requests, answers, strict=True)
        )
        return DecodeRun(*steady_rate(times), texts)

    async def prefill(self, prompt: int) -> float:
        """Prompt tokens a second, from the request to its first token."""
        request = self._request(prompt, 1)
        begin = time.perf_counter()
        answer = await self._run(request)
        return prompt / (answer[-1][0] - begin)

    def _request(self, prompt: int, tokens: int) -> Generate:
        ids = tuple(self._random.randrange(self._vocabulary) for _ in range(prompt))
        return Generate(f"bench-{next(self._names)}", ids, tokens, GREEDY, (), 0, False)

    async def _run(self, request: Generate) -> list[tuple[float, int]]:
        """Each token with when it came."""
        found: list[tuple[float, int]] = []
        async for news in self._client.generate(request):
            now = time.perf_counter()
            found += [(now, token) for token in news.tokens]
            if news.finish == "error":
                raise BenchError(f"{request.request}: {news.error}")
        if len(found) != request.max_tokens:
            raise BenchError(f"{request.request}: {len(found)} tokens came, {request.max_tokens} were asked for")
        return found


def steady_rate(times: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Tokens a second and the median seconds of a step while all sequences decode. times: of each one's tokens, equal
    for tokens that came together.

    Counted from the token of each sequence that comes SETTLING steps after the last sequence's first one, up to the
    first sequence's last. Raises BenchError when that leaves nothing to measure.
    """
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    # The sequence that started last has a token in every step of the window.
    last = max(times, key=lambda each: each[0])
    moments = [moment for moment in last if begin <= moment <= end][SETTLING:]
    if not moments or moments[-1] <= moments[0]:
        raise BenchError("too few tokens to measure: hardly a step ran with all sequences of the batch; decode more")
    came = Counter(moments)
    steps = [(late - early) / came[late] for early, late in itertools.pairwise(came) for _ in range(came[late])]
    return len(times) * len(steps) / (moments[-1] - moments[0]), statistics.median(steps)
