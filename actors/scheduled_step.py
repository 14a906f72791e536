"""What the scheduler remembers of steps on their way, and whether results answer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .live_request import LiveRequest
from .scheduler_config import SchedulerConfig
from .step_plan import Decodes, NewTokens, PromptScores, Slice, StepResult


class SchedulerError(ValueError):
    """Results that do not fit the plans: a bug or a foreign message, never a client's mistake."""


@dataclass(frozen=True)
class Work:
    """What one shard runs in a step. decoding: whose `decodes` are; slices: of prompts, each with whose it is.

    sampled: the sequences that get a token, in their order.
    """

    decoding: tuple[LiveRequest, ...]
    decodes: Decodes
    slices: tuple[tuple[LiveRequest, Slice], ...]

    @property
    def sampled(self) -> tuple[int, ...]:
        return self.decodes.sequences + tuple(part.sequence for _, part in self.slices if part.sample)


@dataclass(frozen=True)
class ScheduledStep:
    """A step on its way. work: of every shard."""

    number: int
    work: tuple[Work, ...]

    def check(self, config: SchedulerConfig, results: Sequence[StepResult]) -> dict[int, StepResult]:
        """The results by shard; raises `SchedulerError` unless they answer this step's plans exactly."""
        shards = sorted(result.shard for result in results)
        if shards != list(range(config.shards)):
            raise SchedulerError(
                f"step {self.number}: results of shards {shards}, expected one of each of {config.shards}"
            )
        for result in results:
            where = f"step {self.number}, shard {result.shard}"
            asked = (config.engine, config.epoch, self.number)
            got = (result.engine, result.epoch, result.step)
            if got != asked:
                raise SchedulerError(f"{where}: result of engine, epoch, step {got}, expected {asked}")
            if result.error:
                raise SchedulerError(f"{where}: {result.error}")
            work = self.work[result.shard]
            _check_tokens(where, work, result.tokens)
            _check_scores(where, work, result.scores)
        return {result.shard: result for result in results}


def _check_tokens(where: str, work: Work, tokens: NewTokens) -> None:
    if tokens.sequences != work.sampled:
        raise SchedulerError(f"{where}: tokens of sequences {tokens.sequences}, expected of {work.sampled}")
    count, sizes = len(tokens.sequences), (len(tokens.tokens), len(tokens.logprobs), len(tokens.tops))
    if sizes not in ((count, count, count), (count, count, 0)):
        raise SchedulerError(f"{where}: {sizes} tokens, log probabilities and tops of {count} sequences")


def _check_scores(where: str, work: Work, scores: Sequence[PromptScores]) -> None:
    if not scores and not any(live.scoring for live, _ in work.slices):
        return
    due = [(part.sequence, part.start, _scores_of(live, part)) for live, part in work.slices]
    asked = sorted(item for item in due if item[2])
    got = sorted((item.sequence, item.start, len(item.logprobs)) for item in scores if item.logprobs)
    if got != asked:
        raise SchedulerError(f"{where}: scores (sequence, start, count) {got}, expected {asked}")
    compares = {part.sequence for live, part in work.slices if live.request.compare}
    for item in scores:
        wanted = len(item.logprobs) if item.sequence in compares and not item.error else 0
        if (len(item.divergences), len(item.agreements)) != (wanted, wanted):
            found = f"{len(item.divergences)} divergences and {len(item.agreements)} agreements"
            raise SchedulerError(f"{where}: {found} of sequence {item.sequence}, expected {wanted}")


def _scores_of(live: LiveRequest, part: Slice) -> int:
    """How many log probabilities a slice must answer with."""
    return len(part.tokens) - (part.next_token < 0) if live.scoring else 0
