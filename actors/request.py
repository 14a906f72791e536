"""What fronts and batch jobs ask of the router, and what it answers: frozen, versioned, encoded by `wire`."""

from __future__ import annotations

from dataclasses import dataclass

from .step_plan import Sampling, StageTime
from .wire import message


@message(version=1)
@dataclass(frozen=True)
class Generate:
    """A prompt to continue. request: unique name chosen by the client.

    priority: 0 interactive, 1 batch; lower runs first. With `score_prompt` the answer carries prompt log
    probabilities; max_tokens 0 then only scores.
    """

    request: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    priority: int
    score_prompt: bool


@message(version=1)
@dataclass(frozen=True)
class Cancel:
    """The client no longer wants `request`; no answer follows."""

    request: str


@message(version=1)
@dataclass(frozen=True)
class Progress:
    """New tokens of one request.

    finish: "" while it runs, else "stop" (a stop token, not among `tokens`), "length", or "error" (see `error`).
    scores: prompt log probabilities (n - 1 of them), once, if asked for.
    """

    request: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    scores: tuple[float, ...]
    finish: str
    error: str


@message(version=1)
@dataclass(frozen=True)
class ProgressBatch:
    """One message a step to each client, with all its requests' news."""

    engine: str
    items: tuple[Progress, ...]


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


@message(version=1)
@dataclass(frozen=True)
class EngineStatus:
    """State of an engine. ready: takes requests; error: why not. Precision plan lines are ready to print."""

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
