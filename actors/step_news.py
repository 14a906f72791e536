"""What a step has to tell clients."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Progress, ProgressBatch


@dataclass
class StepNews:
    """requests, tokens, logprobs: columns, of requests that have one token more and nothing else to tell. items: all
    other news. A request is in one of both, once."""

    requests: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    items: list[Progress] = field(default_factory=list)

    def add(self, request: str, token: int, logprob: float) -> None:
        """A request has a token more."""
        self.requests.append(request)
        self.tokens.append(token)
        self.logprobs.append(logprob)

    def batch(self, engine: str) -> ProgressBatch:
        """The same as a message."""
        return ProgressBatch(engine, tuple(self.items), tuple(self.requests), tuple(self.tokens), tuple(self.logprobs))
