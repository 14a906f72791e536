"""The limits of one engine epoch, and which requests can never run within them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields

from .request import Generate
from .sampling_faults import sampling_faults

PRIORITIES = (0, 1)


@dataclass(frozen=True)
class SchedulerConfig:
    """What the scheduler may use.

    num_pages: KV pages of each shard; page_size: in tokens. max_batch_tokens: of one shard in one step.
    max_sequences: running at once, on all shards together. context_length: prompt and answer together.
    program: the stage program's id, named in every plan. prefix_cache: whether sequences share the pages of what they
    begin with. preemption: whether a sequence may be stopped and run again; without it pages for the whole answer are
    reserved at admission, and every token runs once. Raises ValueError, naming the field, if one is too small.
    """

    engine: str
    epoch: int
    shards: int
    num_pages: int
    page_size: int
    max_batch_tokens: int
    max_sequences: int
    context_length: int
    vocab_size: int
    program: str
    prefix_cache: bool = True
    preemption: bool = True

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least = 0 if item.name == "epoch" else 1
            if type(value) is int and value < least:
                raise ValueError(f"{item.name}: {value} is below {least}")

    def pages_for(self, request: Generate) -> int:
        """KV pages that a request needs for its prompt and all its answer, in the worst case."""
        # The last token is sampled, but never run: its keys and values are not stored.
        tokens = len(request.prompt) + max(request.max_tokens - 1, 0)
        return -(-tokens // self.page_size)

    def refusal(self, request: Generate) -> str:
        """Why a request can never run, naming the field and the limit; "" if it can."""
        return next(self._faults(request), "")

    def _faults(self, request: Generate) -> Iterator[str]:
        length, least = len(request.prompt), 0 if request.score_prompt else 1
        if length == 0:
            yield "prompt: is empty, it needs at least 1 token"
        if request.priority not in PRIORITIES:
            yield f"priority: {request.priority} is none of {PRIORITIES}"
        if request.max_tokens < least:
            yield f"max_tokens: {request.max_tokens} is below 1 (0 is for score_prompt only)"
        if request.emitted and len(request.emitted) >= request.max_tokens:
            yield f"emitted: {len(request.emitted)} tokens are all that max_tokens {request.max_tokens} allows"
        lists = ("prompt", request.prompt), ("stop_tokens", request.stop_tokens), ("emitted", request.emitted)
        for name, tokens in lists:
            if tokens and (min(tokens) < 0 or max(tokens) >= self.vocab_size):
                wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
                yield f"{name}: token {wrong} is outside the vocabulary of {self.vocab_size} tokens"
        yield from sampling_faults(request.sampling, self.vocab_size)
        yield from _file_faults(request)
        total, pages = length + request.max_tokens, self.pages_for(request)
        sizes = f"{length} tokens and max_tokens {request.max_tokens}"
        if total > self.context_length:
            yield f"prompt: {sizes} together are {total}, more than the context_length of {self.context_length}"
        if pages > self.num_pages:
            yield f"prompt: {sizes} need {pages} KV pages of {self.page_size} tokens, a shard has {self.num_pages}"


def _file_faults(request: Generate) -> Iterator[str]:
    for name, path in (("keep", request.keep), ("compare", request.compare)):
        if path and not request.score_prompt:
            yield f"{name}: {path!r} is for score_prompt only"
        if path and not os.path.isabs(path):
            yield f"{name}: {path!r} is not an absolute path, which shards on other nodes need"
        if "\0" in path:
            yield f"{name}: {path!r} is no path"
    if request.keep and request.keep == request.compare:
        yield f"keep: is the same file as compare, {request.keep!r}"
