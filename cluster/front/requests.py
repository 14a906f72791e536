"""What a client may ask, strictly: a field that is unknown or has no effect here is refused by name.

OpenAI fields without support are accepted with the value that asks for nothing (`store: false`, `suffix: ""`), since
clients send those. `user` is accepted with any text and has no effect. `stop` is looked for in the answer, not in the
thinking and not in tool calls.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StrictBool,
    ValidationError,
    model_validator,
)

from ..fields import first_error
from .errors import RequestError
from .sampling_request import NEUTRAL, Choices, SamplingRequest, TopLogprobs
from .strict import Strict, fail


def _text(value: Any) -> Any:
    """Content as text: a string, or a list of text parts. Anything else in it is refused."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or "type" not in part:
            raise fail(f"part {index} must be an object with a 'type'")
        if part["type"] != "text":
            raise fail(f"part {index} is of type {part['type']!r}; this server takes text only")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise fail(f"part {index} must hold 'type' and 'text', a string, and nothing else")
        texts.append(part["text"])
    return "".join(texts)


def _thinking(value: Any) -> Any:
    """true and false, or {"type": "enabled"} and {"type": "disabled"} as Moonshot's own service takes it."""
    if isinstance(value, dict):
        if value == {"type": "enabled"}:
            return True
        if value == {"type": "disabled"}:
            return False
        raise fail("must be true, false, {'type': 'enabled'} or {'type': 'disabled'}")
    return value


def _choice(value: Any) -> Any:
    """One of three words, or a tool by its name."""
    if value not in (None, "auto", "none", "required") and not isinstance(value, dict):
        raise fail("must be 'auto', 'none', 'required' or {'type': 'function', 'function': {'name': …}}")
    return value


def _prompt(value: Any) -> Any:
    """A text, or a list all of texts, all of ids, or all of lists of ids; never empty."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not (_all(value, str) or _ids(value) or all(map(_ids, value))):
        raise fail("must be a string, a list of strings, a list of token ids, or a list of such lists, none empty")
    return value


def _all(values: list[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and _all(value, int)


Text = Annotated[str, BeforeValidator(_text)]


class FunctionCall(Strict):
    """The function of a call: its name and its arguments, a JSON object as text."""

    name: str = Field(min_length=1)
    arguments: str


class CallMade(Strict):
    """A call in an assistant's message that is sent back."""

    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(Strict):
    """One turn. Fields of answers that other servers fill (refusal, audio …) may be sent back as null."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = Field(default=None, min_length=1)
    reasoning_content: str | None = None
    tool_calls: list[CallMade] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _fits_role(self) -> ChatMessage:
        if self.role != "assistant":
            if self.content is None:
                raise fail(f"a {self.role} message needs 'content'")
            if self.tool_calls or self.reasoning_content:
                raise fail("only an assistant message may have 'tool_calls' or 'reasoning_content'")
        elif self.content is None and not self.tool_calls:
            raise fail("an assistant message needs 'content' or 'tool_calls'")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise fail("'tool_call_id' belongs to every tool message and to no other")
        return self


class Function(BaseModel):
    """A function's declaration. It goes to the model as it was sent, so further keys are allowed.

    strict: whether the arguments must follow `parameters`, a JSON schema; null: where calls are forced.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.\-]+$")
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Strict):
    """A tool: {"type": "function", "function": {"name", "description", "parameters"}}.

    sent: the object as the client wrote it, with its order of keys, which is what the model is shown.
    """

    type: Literal["function"]
    function: Function
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, data: Any, check: ModelWrapValidatorHandler[Tool]) -> Tool:
        tool = check(data)
        tool._sent = data
        return tool

    @property
    def sent(self) -> dict[str, Any]:
        return self._sent


class FunctionName(Strict):
    """The function that is to be called."""

    name: str = Field(min_length=1)


class NamedTool(Strict):
    """{"type": "function", "function": {"name"}}."""

    type: Literal["function"]
    function: FunctionName


class TemplateOptions(Strict):
    """thinking: whether the answer begins with thinking."""

    thinking: StrictBool | None = None


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions. `thinking` may also stand in `chat_template_kwargs`; the default is to think.

    tool_choice: "required" has the answer call tools and say nothing else, a name that one tool once.
    parallel_tool_calls: false allows one call at most.
    """

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: Annotated[Literal["auto", "none", "required"] | NamedTool | None, BeforeValidator(_choice)] = None
    parallel_tool_calls: StrictBool | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: StrictBool | None = None
    top_logprobs: TopLogprobs | None = None
    thinking: Annotated[StrictBool | None, BeforeValidator(_thinking)] = None
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise fail("'max_tokens' and 'max_completion_tokens' differ; send one of them")
        inner = self.chat_template_kwargs.thinking if self.chat_template_kwargs else None
        if None not in (self.thinking, inner) and self.thinking != inner:
            raise fail("'thinking' and 'chat_template_kwargs.thinking' differ; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise fail("'top_logprobs' needs 'logprobs': true")
        if self.must_call and not self.callable_tools:
            raise fail("'tool_choice' must be 'auto', 'none', 'required' or the name of one of 'tools'")
        return self

    @property
    def thinks(self) -> bool:
        inner = self.chat_template_kwargs.thinking if self.chat_template_kwargs else None
        return next((value for value in (self.thinking, inner) if value is not None), True)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def told_logprobs(self) -> int:
        """How many of the most probable tokens are told beside each one."""
        return self.top_logprobs or 0

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """Declarations for the prompt, as they were sent; none with `tool_choice: "none"`."""
        if self.tool_choice == "none":
            return []
        return [tool.sent for tool in self.tools or []]

    @property
    def must_call(self) -> bool:
        """Whether the answer has to call a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def callable_tools(self) -> list[tuple[int, Tool]]:
        """The tools that the answer may call, with their places in `tools`."""
        if self.tool_choice == "none":
            return []
        tools = list(enumerate(self.tools or []))
        if isinstance(self.tool_choice, NamedTool):
            return [(index, tool) for index, tool in tools if tool.function.name == self.tool_choice.function.name]
        return tools

    @property
    def may_call_often(self) -> bool:
        """Whether the answer may have more calls than one."""
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)


class CompletionRequest(SamplingRequest):
    """POST /v1/completions. prompt: a text, several texts, ids of tokens, or several lists of ids.

    A text is text: only ids can ask for special tokens. logprobs: the log probability of each token, and so many of the
    most probable ones beside it. best_of: so many answers are made to each prompt, and the `n` with the highest mean
    log probability of their tokens are given, the best first.
    """

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_prompt)]
    logprobs: TopLogprobs | None = None
    best_of: Choices | None = None

    @model_validator(mode="after")
    def _best_of_fits(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.choices:
            raise fail(f"'best_of' {self.best_of} is less than 'n' {self.choices}, the answers to be given")
        if self.stream and self.candidates > self.choices:
            raise fail("'best_of' above 'n' cannot be streamed: which answers are best is known at their end")
        return self

    @property
    def candidates(self) -> int:
        """Answers to make to each prompt."""
        return self.best_of or self.choices

    @property
    def told_logprobs(self) -> int:
        """How many of the most probable tokens are told beside each one."""
        return self.logprobs or 0

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry a choice."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


R = TypeVar("R", bound=Strict)


def parse(body: Any, kind: type[R]) -> R:
    """Checks a decoded JSON body. Raises RequestError (400) that names the field and says what would be right."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            if found["type"] == "unsupported":
                raise _unsupported(found["msg"]) from None
        path, message = first_error(error, kind)
        raise RequestError(message, param=path or None, code="invalid_request") from None


def _unsupported(field: str) -> RequestError:
    values = [value for value in NEUTRAL[field] if value is not None]
    allowed = " or ".join(repr(value) for value in values)
    hint = f"; leave it out, or send {allowed}" if values else "; leave it out"
    return RequestError(f"'{field}' is not supported yet{hint}", param=field, code="unsupported_parameter")
