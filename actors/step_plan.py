"""What the router tells the shards each step, and what they answer: frozen, versioned, encoded by `wire`.

A shard keeps the state of its sequences (pages, last token, sampling), so a plan carries only what is new. Every
message bears the engine's name and epoch; one of another engine or epoch is dropped and counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from .wire import message


@message(version=3)
@dataclass(frozen=True)
class Sampling:
    """How a sequence's next tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1.0 are off.

    min_p: tokens less probable than min_p times the most probable one are left out; 0.0 is off.
    presence_penalty, frequency_penalty: taken off the logits of generated tokens, once and each time; 0.0 is off.
    repetition_penalty: divides positive, multiplies negative logits of tokens in the prompt or generated; 1.0 is off.
    logit_bias: (token, added to its logit). stop_ban: tokens that cannot be drawn before `min_tokens` are generated.
    top_logprobs: how many of the most probable tokens are told beside each token. grammar: what the answer must follow
    (`grammar`), "" for anything; grammar_ends: the tokens that are allowed where it may end. Penalties, bias, bans and
    grammars change what is drawn, never the log probabilities that are told.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_ban: tuple[int, ...] = ()
    top_logprobs: int = 0
    grammar: str = ""
    grammar_ends: tuple[int, ...] = ()

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on how often it came before."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


@message(version=4)
@dataclass(frozen=True)
class SequenceStart:
    """A sequence that begins on a shard. With `score_prompt` the shard also answers the prompt's log probabilities.

    keep, compare: as in `Generate`. generated: how many tokens the sequence had generated when it was preempted; they
    are the last of those it begins with, so that penalties, `min_tokens` and grammar go on unchanged. history: where
    `sampling.penalizes`, all tokens that it begins with; with a grammar alone those generated; else none. A shard
    cannot tell them from the slices, since those leave out what the prefix cache has.
    """

    sequence: int
    sampling: Sampling
    score_prompt: bool
    keep: str = ""
    compare: str = ""
    generated: int = 0
    history: tuple[int, ...] = ()


@message(version=1)
@dataclass(frozen=True)
class Decodes:
    """Sequences that run the token they sampled last, and sample the next one: a row each, whose columns these are.

    sequences. starts: the position of each one's token, which follows its last one. page_rows, new_pages: the rows that
    need one more KV page for it, and that page.
    """

    sequences: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    page_rows: tuple[int, ...] = ()
    new_pages: tuple[int, ...] = ()


@message(version=3)
@dataclass(frozen=True)
class Slice:
    """The tokens of one sequence that run this step, as given: of its prompt, or of all it had when it was preempted.

    start: position of the first token. It follows the sequence's last one, or lies at the beginning of a page further
    on, for what is between comes from the prefix cache. tokens: the ids to run, at least one. new_pages: the sequence's
    last KV pages from now on: with those before them that it keeps, they hold its tokens up to the slice's end, and no
    page is left over. Of pages that the cache gave it writes none.
    sample: whether the last position is sampled (not so in the middle of a chunked prefill). next_token: with
    `score_prompt`, the prompt token that follows the slice, which the last position scores; -1 at the prompt's end and
    where nothing is scored.
    """

    sequence: int
    start: int
    tokens: tuple[int, ...]
    new_pages: tuple[int, ...]
    sample: bool
    next_token: int = -1


@message(version=4)
@dataclass(frozen=True)
class StepPlan:
    """One step of one shard. All shards get a plan each step, also an empty one: they hold experts for the others.

    A shard first drops the sequences in `ends` (their pages may be another's in this very plan), then takes up
    `starts`, then runs `decodes` and behind them `slices`, a sequence once. Sequence numbers are never used again.
    decode_rows: the decodes of the shard that has the most, where no shard has slices; else 0.
    placement: the last change of experts' places that this step runs with (`ExpertMover`); 0 before the first.
    """

    engine: str
    epoch: int
    step: int
    program: str
    ends: tuple[int, ...]
    starts: tuple[SequenceStart, ...]
    slices: tuple[Slice, ...]
    trace: bool
    decode_rows: int = 0
    placement: int = 0
    decodes: Decodes = Decodes()

    @property
    def rows(self) -> int:
        """Tokens that run."""
        return len(self.decodes.sequences) + sum(len(part.tokens) for part in self.slices)

    @property
    def sequences(self) -> int:
        """How many run."""
        return len(self.decodes.sequences) + len(self.slices)


Top = tuple[tuple[int, float], ...]
"""The most probable tokens of a row with their log probabilities, best first."""


@message(version=2)
@dataclass(frozen=True)
class NewTokens:
    """Sampled tokens in the order of the plan, columns. logprobs: each one's log probability under the model
    (temperature 1). tops: of each the `Sampling.top_logprobs` most probable tokens; empty where nobody asks for any.
    faults: (sequence, why its token does not count), which ends that sequence, not the step.
    """

    sequences: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    tops: tuple[Top, ...] = ()
    faults: tuple[tuple[int, str], ...] = ()


@message(version=2)
@dataclass(frozen=True)
class PromptScores:
    """Log probabilities (temperature 1) of prompt tokens start + 1.. given all before them, for the slice from `start`.

    Answered for every slice with `tokens` of a `score_prompt` sequence. A slice of n tokens gives n values, the last
    one for its `next_token`; at the prompt's end, where that is -1, n - 1 values. So the shard keeps nothing from
    slice to slice, and a prompt of n tokens has n - 1 values. Where there are none, no answer is needed.

    divergences, agreements: as many, for a sequence that compares (`Comparison`), else none. error: why the sequence's
    distributions could not be kept or compared; it ends this sequence, not the step.
    """

    sequence: int
    start: int
    logprobs: tuple[float, ...]
    divergences: tuple[float, ...] = ()
    agreements: tuple[bool, ...] = ()
    error: str = ""


@message(version=1)
@dataclass(frozen=True)
class StageTime:
    """One stage's measured interval in a shard, nanoseconds of `time.perf_counter_ns`."""

    name: str
    begin: int
    end: int


@message(version=2)
@dataclass(frozen=True)
class StepResult:
    """A shard's answer to a plan. `error` is empty or says what failed; then nothing else counts."""

    engine: str
    epoch: int
    step: int
    shard: int
    tokens: NewTokens
    scores: tuple[PromptScores, ...]
    stages: tuple[StageTime, ...]
    error: str
