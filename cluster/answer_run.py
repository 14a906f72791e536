"""From a request and the tokens of its prompt to what the engine is asked, or a refusal."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from ..actors.step_plan import Sampling
from .answer_grammar import AnswerGrammar
from .front.errors import RequestError
from .front.requests import ChatRequest, CompletionRequest
from .tokenizer import Tokenizer

# Kimi-K2.5's recommended sampling.
TOP_P = 0.95

END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "[EOS]"
_SEED_MASK = 2**63 - 1
# For `max_waiting`, where a job bounds its requests itself: the service's own bound is against strangers.
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class ServiceLimits:
    """context_length: most tokens of a prompt and its answer. default_max_tokens: of an answer when the request says
    nothing; 0: what the context leaves. max_waiting: requests that wait for their first token; more are refused."""

    context_length: int
    default_max_tokens: int = 0
    max_waiting: int = 1024


@dataclass(frozen=True)
class AnswerRun:
    """One answer that the engine is asked for. first: of those to its prompt, which count the prompt once."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    first: bool


class RunMaker:
    """Applies a model's defaults and limits to requests."""

    def __init__(self, tokenizer: Tokenizer, limits: ServiceLimits) -> None:
        self._limits = limits
        self._tokens, self._base_tokens = tokenizer.size, tokenizer.base_size
        self._end_tokens = (tokenizer.special[END_OF_TURN], tokenizer.special[END_OF_TEXT])

    def runs(
        self,
        request: ChatRequest | CompletionRequest,
        prompt: list[int],
        where: str,
        temperature: float,
        count: int,
        grammar: AnswerGrammar | None,
    ) -> list[AnswerRun]:
        """`count` answers to one prompt; their seeds are the request's seed, one more, and so on, below 2^63.

        temperature: when the request says nothing. where: the prompt's name in errors. grammar: of each answer. Raises
        RequestError.
        """
        if grammar is not None:
            self._check_ends(request, grammar)
        max_tokens = self._max_tokens(request, len(prompt), where)
        for name, tokens in (
            ("logit_bias", [token for token, _ in request.logit_bias]),
            ("stop_token_ids", request.stop_token_ids),
        ):
            for token in tokens:
                if token >= self._tokens:
                    message = f"'{name}': {token} is no token; ids are 0 to {self._tokens - 1}"
                    raise RequestError(message, param=name, code="invalid_request")
        seed = secrets.randbits(63) if request.seed is None else request.seed
        stop_tokens = (() if request.ignore_eos else self._end_tokens) + request.stop_token_ids
        ids, text = tuple(prompt), "" if grammar is None else grammar.text
        drawn = [_sampling(request, temperature, seed + index, stop_tokens, text) for index in range(count)]
        return [AnswerRun(ids, max_tokens, each, stop_tokens, index == 0) for index, each in enumerate(drawn)]

    def _check_ends(self, request: ChatRequest | CompletionRequest, grammar: AnswerGrammar) -> None:
        """With a grammar an answer ends where that may end, and by a special token."""
        ordinary = [token for token in request.stop_token_ids if token < self._base_tokens]
        for name, wrong in (
            ("ignore_eos", request.ignore_eos),
            ("min_tokens", bool(request.min_tokens)),
            ("stop_token_ids", bool(ordinary)),
        ):
            if wrong:
                what = f"token {ordinary[0]}, which is text," if name == "stop_token_ids" else "it"
                message = f"'{name}': {what} cannot say when an answer ends whose form '{grammar.place}' gives"
                raise RequestError(message, param=name, code="invalid_request")

    def _max_tokens(self, request: ChatRequest | CompletionRequest, length: int, where: str) -> int:
        limit = self._limits.context_length
        room = limit - length
        if room < 1:
            message = f"the prompt has {length} tokens; the context holds {limit}, an answer included"
            raise RequestError(message, param=where, code="context_length_exceeded")
        asked = request.token_limit
        if asked is not None and asked > room:
            message = f"the prompt's {length} tokens and max_tokens {asked} exceed the context of {limit} tokens"
            raise RequestError(message, param="max_tokens", code="context_length_exceeded")
        found = min(self._limits.default_max_tokens or room, room) if asked is None else asked
        if (request.min_tokens or 0) > found:
            message = f"'min_tokens' {request.min_tokens} is more than the {found} tokens that this answer may have"
            raise RequestError(message, param="min_tokens", code="invalid_request")
        return found


def _sampling(
    request: ChatRequest | CompletionRequest, temperature: float, seed: int, stop_tokens: tuple[int, ...], grammar: str
) -> Sampling:
    min_tokens = request.min_tokens or 0
    return Sampling(
        temperature=temperature if request.temperature is None else float(request.temperature),
        top_p=TOP_P if request.top_p is None else float(request.top_p),
        top_k=max(request.top_k or 0, 0),
        seed=seed & _SEED_MASK,
        min_p=float(request.min_p or 0.0),
        presence_penalty=float(request.presence_penalty or 0.0),
        frequency_penalty=float(request.frequency_penalty or 0.0),
        repetition_penalty=float(1.0 if request.repetition_penalty is None else request.repetition_penalty),
        logit_bias=request.logit_bias,
        min_tokens=min_tokens,
        stop_ban=stop_tokens if min_tokens else (),
        top_logprobs=request.told_logprobs,
        grammar=grammar,
        grammar_ends=stop_tokens if grammar else (),
    )
