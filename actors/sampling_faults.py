"""What is wrong with how a request wants its tokens drawn; a shard that got such values would fail for all requests."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..kernels.sampling_limits import MAX_TOP_LOGPROBS
from .step_plan import Sampling

# OpenAI's ranges.
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASED_TOKENS = 1024


def sampling_faults(sampling: Sampling, vocab_size: int) -> Iterator[str]:
    """Yields a line for each value out of range, with the field's name and what would be right."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        yield f"sampling.temperature: {sampling.temperature} is not a finite number of at least 0"
    if not 0 < sampling.top_p <= 1:
        yield f"sampling.top_p: {sampling.top_p} is not above 0 and at most 1"
    if sampling.top_k < 0:
        yield f"sampling.top_k: {sampling.top_k} is below 0"
    if not 0 <= sampling.min_p <= 1:
        yield f"sampling.min_p: {sampling.min_p} is not from 0 to 1"
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        if not -MAX_PENALTY <= value <= MAX_PENALTY:
            yield f"sampling.{name}: {value} is not from {-MAX_PENALTY:g} to {MAX_PENALTY:g}"
    if not (math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        yield f"sampling.repetition_penalty: {sampling.repetition_penalty} is not a finite number above 0"
    if sampling.min_tokens < 0:
        yield f"sampling.min_tokens: {sampling.min_tokens} is below 0"
    if not 0 <= sampling.top_logprobs <= MAX_TOP_LOGPROBS:
        yield f"sampling.top_logprobs: {sampling.top_logprobs} is not from 0 to {MAX_TOP_LOGPROBS}"
    if sampling.grammar and not sampling.grammar_ends:
        yield "sampling.grammar_ends: no token may end what the grammar describes"
    if sampling.grammar and sampling.stop_ban and sampling.min_tokens:
        yield "sampling.min_tokens: a grammar says itself when an answer may end"
    yield from _token_faults(sampling, vocab_size)


def _token_faults(sampling: Sampling, vocab_size: int) -> Iterator[str]:
    biased = [token for token, _ in sampling.logit_bias]
    if len(biased) > MAX_BIASED_TOKENS:
        yield f"sampling.logit_bias: names {len(biased)} tokens, at most {MAX_BIASED_TOKENS} can be biased"
    if len(set(biased)) < len(biased):
        yield "sampling.logit_bias: names a token twice"
    for token, bias in sampling.logit_bias:
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            yield f"sampling.logit_bias: {bias} for token {token} is not from {-MAX_BIAS:g} to {MAX_BIAS:g}"
    named = ("logit_bias", biased), ("stop_ban", sampling.stop_ban), ("grammar_ends", sampling.grammar_ends)
    for name, tokens in named:
        for token in tokens:
            if not 0 <= token < vocab_size:
                yield f"sampling.{name}: token {token} is outside the vocabulary of {vocab_size} tokens"
    if len(set(sampling.stop_ban)) >= vocab_size:
        yield f"sampling.stop_ban: bans all {vocab_size} tokens, so that none could be drawn"
