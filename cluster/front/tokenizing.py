"""POST /tokenize and /detokenize: a text or a chat as the tokens that the model gets, and back, with vLLM's fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, model_validator

from .requests import ChatMessage, TemplateOptions, Tool
from .sampling_request import Strict, fail


class TokenizeRequest(Strict):
    """A text (`prompt`), or a chat (`messages`, `tools`) rendered as for an answer.

    add_special_tokens: Kimi's tokenizer puts none around a text, and the template's own are always there, so either
    value asks for the same. return_token_strs: also the written form of each token.
    """

    model: str | None = Field(default=None, min_length=1)
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: Literal[True] | None = None
    return_token_strs: StrictBool | None = None

    @model_validator(mode="after")
    def _a_text_or_a_chat(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise fail("give either 'prompt', a text, or 'messages'")
        if self.messages is None and (self.tools or self.chat_template_kwargs or self.add_generation_prompt):
            raise fail("'tools', 'chat_template_kwargs' and 'add_generation_prompt' belong to 'messages'")
        return self

    @property
    def thinks(self) -> bool:
        inner = self.chat_template_kwargs.thinking if self.chat_template_kwargs else None
        return True if inner is None else inner

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """Declarations for the prompt, as they were sent."""
        return [tool.sent for tool in self.tools or []]


class DetokenizeRequest(Strict):
    """tokens: ids; special ones become their names."""

    model: str | None = Field(default=None, min_length=1)
    tokens: list[int]
