"""What the scheduler remembers of an unfinished request: where its text stands, and what it holds while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from .prefix_cache import extend_keys
from .request import Generate
from .step_plan import PromptScores, SequenceStart


@dataclass(eq=False)
class LiveRequest:
    """A request that waits or runs. It may be preempted and run again, each time as a sequence of another `number`.

    arrival: counts requests. text: prompt and generated tokens. keys: of the text's full pages, if it shares pages.
    While it runs: shard; pages, of which the shard knows `told`; known_pages: how many of them the cache knows.
    reserved: pages promised and not handed over yet; awaited: how many of those others that run now should fill.
    position, sampled: tokens run and sampled, as planned; prefill: tokens that it began with. in_flight: slices
    planned and not answered. begun: tokens of the prompt that ran or came from the cache in whatever run; cached:
    those that came from the cache. told_prompt: what is to be told of the prompt has been.
    """

    arrival: int
    request: Generate
    text: list[int]
    shares: bool
    keys: list[bytes] = field(default_factory=list)
    number: int = -1
    shard: int = -1
    pages: list[int] = field(default_factory=list)
    told: int = 0
    reserved: int = 0
    awaited: int = 0
    known_pages: int = 0
    position: int = 0
    sampled: int = 0
    prefill: int = 0
    in_flight: int = 0
    begun: int = 0
    cached: int = 0
    scores: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)
    told_prompt: bool = False
    running: bool = False
    started: bool = False
    done: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """The lower, the sooner it is admitted and the later preempted: priority, then arrival."""
        return self.request.priority, self.arrival

    @property
    def generated(self) -> int:
        return len(self.text) - len(self.request.prompt)

    @property
    def prefilling(self) -> bool:
        return self.position < self.prefill

    @property
    def decoding(self) -> bool:
        return self.position >= self.prefill and self.sampled < self.request.max_tokens

    @property
    def scoring(self) -> bool:
        """Whether the prompt's scores are still to be told; they come from one run from the first token on."""
        return self.request.score_prompt and not self.told_prompt

    @property
    def start(self) -> SequenceStart:
        """What a shard must know when the sequence begins there."""
        request = self.request
        history: list[int] = []
        if request.sampling.penalizes:
            history = self.text
        elif request.sampling.grammar:
            history = self.text[len(self.text) - self.generated :]
        return SequenceStart(
            self.number,
            request.sampling,
            self.scoring,
            request.keep if self.scoring else "",
            request.compare if self.scoring else "",
            generated=self.generated,
            history=tuple(history),
        )

    def extend_keys(self, page_size: int) -> None:
        """Brings `keys` up to the text, for a request that shares pages."""
        if self.shares:
            extend_keys(self.keys, self.text, page_size)

    def take(self, token: int) -> str:
        """Adds a sampled token, but for one that stops it; returns how the request ends with it, "" if it goes on."""
        if token in self.request.stop_tokens:
            return "stop"
        self.text.append(token)
        return "length" if self.generated == self.request.max_tokens else ""

    def add_scores(self, scores: PromptScores) -> None:
        self.scores.extend(scores.logprobs)
        self.divergences.extend(scores.divergences)
        self.agreements.extend(scores.agreements)

    def begin(self, number: int, shard: int) -> None:
        """It runs from its first token, on this shard."""
        self.number, self.shard = number, shard
        self.position, self.prefill, self.sampled = 0, len(self.text), self.generated
        self.running, self.started = True, False

    def stop(self) -> None:
        """It holds nothing any more."""
        self.pages.clear()
        self.told = self.reserved = self.awaited = self.known_pages = 0
        self.running = False

    def forget_run(self) -> None:
        """Nothing of it runs any more, nor is any answer on its way; what was told stays."""
        self.stop()
        self.in_flight = 0
        self.started = False
        if self.scoring:
            self.scores.clear()
            self.divergences.clear()
            self.agreements.clear()

    def move(self, position: int, from_cache: bool) -> None:
        """Tokens up to `position` run, or are in pages from the cache."""
        prompt = min(position, len(self.request.prompt))
        if from_cache:
            self.cached += max(prompt - self.begun, 0)
        self.begun = max(self.begun, prompt)
        self.position = position
