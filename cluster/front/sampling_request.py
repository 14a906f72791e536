"""What chat and text completions have in common: how tokens are drawn, when they end, how many answers there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from ...actors.sampling_faults import MAX_BIAS, MAX_BIASED_TOKENS, MAX_PENALTY
from ...kernels.sampling_limits import MAX_TOP_LOGPROBS
from .strict import Strict, fail
from .structured_output import StructuredRequest

# Known fields that have no support yet, with the values that change nothing and so are let through.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None,),
    "functions": (None,),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "reasoning_effort": (None,),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}


def _stops(value: Any) -> Any:
    """None, a string or up to four strings, as a tuple."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops) or len(stops) > 4:
        raise fail("must be a string or a list of up to 4 strings, none of them empty")
    return tuple(stops)


N = TypeVar("N", int, float)


def _from_to(low: float, high: float) -> Callable[[N], N]:
    """A check that a number is from `low` to `high`."""

    def check(value: N) -> N:
        if not low <= value <= high:
            raise fail(f"must be from {low:g} to {high:g}")
        return value

    return check


def _above_zero(value: float) -> float:
    if not 0 < value < float("inf"):
        raise fail("must be above 0 and finite")
    return value


def _bias(value: Any) -> Any:
    """None, or an object of token ids, written as text, and numbers -> ((token, bias), …), the tokens ascending."""
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASED_TOKENS:
        raise fail(f"must be an object of at most {MAX_BIASED_TOKENS} token ids and their biases")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # Only ids as JSON writes them: int() would also take " 5", "+5" and digits of other scripts.
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise fail(f"keys must be token ids such as '5', found {str(key)[:20]!r}")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise fail(f"the bias of token {key} must be a number from {-MAX_BIAS:g} to {MAX_BIAS:g}")
        if int(key) in biases:
            raise fail(f"token {int(key)} is named twice")
        biases[int(key)] = float(bias)
    return tuple(sorted(biases.items()))


def _token_ids(value: Any) -> Any:
    """None or a list of token ids -> a tuple of them."""
    if value is None:
        return ()
    if not isinstance(value, list) or any(type(token) is not int or token < 0 for token in value):
        raise fail("must be a list of token ids")
    if len(value) > MAX_STOP_TOKENS:
        raise fail(f"must hold at most {MAX_STOP_TOKENS} token ids")
    return tuple(value)


MAX_CHOICES = 16
MAX_STOP_TOKENS = 64

Stops = Annotated[tuple[str, ...], BeforeValidator(_stops)]
Bias = Annotated[tuple[tuple[int, float], ...], BeforeValidator(_bias)]
TokenIds = Annotated[tuple[int, ...], BeforeValidator(_token_ids)]
Penalty = Annotated[float, AfterValidator(_from_to(-MAX_PENALTY, MAX_PENALTY))]
Choices = Annotated[int, AfterValidator(_from_to(1, MAX_CHOICES))]
TopLogprobs = Annotated[int, AfterValidator(_from_to(0, MAX_TOP_LOGPROBS))]


class StreamOptions(Strict):
    """include_usage: a last chunk without choices tells the token counts."""

    include_usage: StrictBool = False


class SamplingRequest(StructuredRequest):
    """The common fields, with OpenAI's meaning and ranges, beyond OpenAI's with vLLM's.

    n: answers to one prompt, whose seeds are `seed`, `seed` + 1, … . logit_bias: added to the logits of tokens; those
    are ids, as text. stop_token_ids: further tokens that end an answer, and like the model's own leave no text.
    ignore_eos: the model's own end no answer. min_tokens: so many tokens come before anything may end an answer.
    """

    model: str = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stops = ()
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: StrictBool = False
    n: Choices | None = None
    min_p: Annotated[float, AfterValidator(_from_to(0, 1))] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, AfterValidator(_above_zero)] | None = None
    logit_bias: Bias = ()
    min_tokens: int | None = Field(default=None, ge=0)
    stop_token_ids: TokenIds = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise fail("must be a JSON object")
        kept = dict(data)
        for name, neutral in NEUTRAL.items():
            if name in kept and name not in cls.model_fields:
                value = kept.pop(name)
                if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral):
                    raise PydanticCustomError("unsupported", "{field}", {"field": name})
        if kept.get("stream") is None:
            kept.pop("stream", None)
        return kept

    @model_validator(mode="after")
    def _fields_fit(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise fail("'stream_options' needs 'stream': true")
        limit = self.token_limit
        if limit is not None and (self.min_tokens or 0) > limit:
            raise fail(f"'min_tokens' {self.min_tokens} is more than the {limit} tokens that an answer may have")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens of an answer, if the request says it."""
        return self.max_tokens

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage
