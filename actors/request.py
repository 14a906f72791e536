"""What fronts and batch jobs ask of the router, and what it answers: frozen, versioned, encoded by `wire`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .expert_state import UNKNOWN, ExpertState
from .step_plan import Sampling, StageTime
from .wire import message


@message(version=3)
@dataclass(frozen=True)
class Generate:
    """A prompt to continue. request: unique name chosen by the client.

    priority: 0 interactive, 1 batch; lower runs first. With `score_prompt` the answer carries prompt log
    probabilities; max_tokens 0 then only scores.

    keep, compare: with `score_prompt`, absolute paths on the shards' nodes of one file each (`KeptDistributions`); ""
    for none. The distributions of all scored positions are written to `keep`, and those in `compare`, which an equal
    prompt kept, are compared with this model's. No HTTP client can set them: they name files of the engine's machines.

    emitted: tokens of the answer that the client has already, from an engine that was lost. This one goes on behind
    them with what the other would have given, and tells nothing again: none of them, nor what is told of the prompt.
    max_tokens counts them.
    """

    request: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    priority: int
    score_prompt: bool
    keep: str = ""
    compare: str = ""
    emitted: tuple[int, ...] = ()


@message(version=1)
@dataclass(frozen=True)
class Cancel:
    """The client no longer wants `request`; no answer follows."""

    request: str


@message(version=4)
@dataclass(frozen=True)
class Progress:
    """New tokens of one request.

    finish: "" while it runs, else "stop" (a stop token, not among `tokens`), "length", or "error" (see `error`).
    scores: prompt log probabilities (n - 1 of them), once, if asked for. divergences, agreements: beside them, with
    `compare`: of each position KL(kept ‖ this) in nats, and whether the most probable token is the same.
    top_logprobs: of each token what `NewToken.top` says; none at all where `Sampling.top_logprobs` is 0.
    cached_tokens: prompt tokens that came from the prefix cache, told once with the first news.
    lost: with an "error", that the engine is at fault, not the request, which another engine can go on with behind what
    has been told (`Generate.emitted`).
    """

    request: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    scores: tuple[float, ...]
    finish: str
    error: str
    divergences: tuple[float, ...] = ()
    agreements: tuple[bool, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    cached_tokens: int = 0
    lost: bool = False

    @staticmethod
    def of_token(request: str, token: int, logprob: float) -> Progress:
        """One token, and all else by default. The constructor of a frozen class calls a function for each field, which
        takes five times as long; a front makes one for each token of each stream."""
        made = object.__new__(Progress)
        values = made.__dict__
        values["request"], values["tokens"], values["logprobs"] = request, (token,), (logprob,)
        values["scores"], values["finish"], values["error"] = (), "", ""
        return made

    @staticmethod
    def failed(request: str, error: str, lost: bool = False) -> Progress:
        """The end of a request with an error."""
        return Progress(request, (), (), (), "error", error, lost=lost)


@message(version=2)
@dataclass(frozen=True)
class ProgressBatch:
    """One message a step to each client, with all its requests' news.

    requests, tokens, logprobs: columns, of requests that have one token more and nothing else to tell. items: all
    other news.
    """

    engine: str
    items: tuple[Progress, ...]
    requests: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()

    @property
    def news(self) -> Iterator[Progress]:
        """All of it, one by one."""
        for request, token, logprob in zip(self.requests, self.tokens, self.logprobs, strict=True):
            yield Progress.of_token(request, token, logprob)
        yield from self.items


@message(version=1)
@dataclass(frozen=True)
class StatusQuery:
    """Asks for `EngineStatus`; `trace_steps` > 0 also asks the engine to record that many steps from now."""

    query: str
    trace_steps: int


@message(version=1)
@dataclass(frozen=True)
class TracedStep:
    """The measured stages of one step on one shard."""

    step: int
    shard: int
    stages: tuple[StageTime, ...]


@message(version=4)
@dataclass(frozen=True)
class EngineStatus:
    """State of an engine. ready: runs requests; error: why it never will again. recovering: which shard it waits for
    before it goes on, while it takes requests, or ""; recoveries: how often shards have come back. Precision plan lines
    are ready to print.

    cached_pages, preemptions, prompt_tokens, cached_tokens: as in `SchedulerStats`. experts: where they are, and their
    load.
    """

    query: str
    engine: str
    epoch: int
    ready: bool
    error: str
    shards: int
    running: int
    waiting: int
    free_pages: int
    total_pages: int
    steps: int
    dropped_messages: int
    context_length: int
    precision_plan: tuple[str, ...]
    trace: tuple[TracedStep, ...]
    cached_pages: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    experts: ExpertState = UNKNOWN
    recovering: str = ""
    recoveries: int = 0
