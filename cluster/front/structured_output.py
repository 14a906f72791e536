"""What form an answer must have: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`.

Each becomes a format of xgrammar's structural tags, of which `answer_grammar` makes a whole answer's grammar.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, model_validator

from .errors import RequestError
from .json_schema import SchemaFault, enforceable
from .strict import Strict, fail
from .string_pattern import pattern_fault

MAX_CHOICES = 1024
# Blanks between the parts of a JSON text, at most so many in a row: a model that has begun may go on without end.
MAX_BLANKS = 32

Format = dict[str, Any]


class JsonSchemaOutput(Strict):
    """name, description: for people. strict: null, true or false; the schema is enforced with each of them."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_\-]+$")
    description: str | None = None
    schema_: Any = Field(default=None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    """{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"name", "schema"}}."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaOutput | None = None

    @model_validator(mode="after")
    def _agree(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise fail("'json_schema' belongs to the type 'json_schema' and to no other")
        return self


Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]


class StructuredOutputs(Strict):
    """vLLM's: one of json (a schema, as an object or as text), regex (of the whole answer), choice, grammar (xgrammar's
    EBNF), json_object."""

    json_: Any = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: StrictBool | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if len(self.asked) != 1:
            raise fail("must hold one of 'json', 'regex', 'choice', 'grammar', 'json_object'")
        return self

    @property
    def asked(self) -> dict[str, Any]:
        """What is asked for, by its name."""
        named = {"json": self.json_} | {name: getattr(self, name) for name in ("regex", "choice", "grammar")}
        found = {name: value for name, value in named.items() if value is not None}
        return found | ({"json_object": True} if self.json_object else {})


class StructuredRequest(Strict):
    """The fields of a request that say what form its answer has. At most one of them may ask for anything."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> StructuredRequest:
        if len(self._forms) > 1:
            raise fail(f"{' and '.join(map(repr, self._forms))} ask for two forms of an answer; send one of them")
        return self

    @property
    def _forms(self) -> dict[str, tuple[str, Any]]:
        """What is asked for, by the place in the request where it stands: (kind, value)."""
        found: dict[str, tuple[str, Any]] = {}
        if self.response_format is not None and self.response_format.type != "text":
            schema = self.response_format.json_schema
            place = "response_format.json_schema.schema" if schema else "response_format"
            found[place] = ("json", schema.schema_) if schema else ("json_object", True)
        if self.structured_outputs is not None:
            for kind, value in self.structured_outputs.asked.items():
                found[f"structured_outputs.{kind}"] = kind, value
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{kind}")
            if value is not None:
                found[f"guided_{kind}"] = kind, value
        return found

    def form(self) -> tuple[str, Format] | None:
        """The form of the answer's content and the field that asks for it; None: any text. Raises RequestError."""
        for place, (kind, value) in self._forms.items():
            return place, _FORMATS[kind](value, place)
        return None


def json_format(schema: Any, place: str) -> Format:
    """Text that is JSON of this schema. place: the schema's name in the request. Raises RequestError."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise refused(place, f"is not JSON: {error}") from None
    try:
        return {"type": "json_schema", "json_schema": enforceable(schema), "max_whitespace_cnt": MAX_BLANKS}
    except SchemaFault as fault:
        raise refused(".".join(filter(None, (place, fault.place))), fault.reason) from None


def refused(place: str, reason: str) -> RequestError:
    """The refusal of a form that cannot be enforced."""
    return RequestError(f"'{place}': {reason}", param=place, code="invalid_request")


def _regex(pattern: str, place: str) -> Format:
    fault = pattern_fault(pattern, in_json=False)
    if fault:
        raise refused(place, fault)
    return {"type": "regex", "pattern": pattern}


def _constant(text: str) -> Format:
    return {"type": "const_string", "value": text}


_FORMATS = {
    "json": json_format,
    "json_object": lambda value, place: json_format({"type": "object"}, place),
    "regex": _regex,
    "choice": lambda value, place: {"type": "or", "elements": [_constant(each) for each in value]},
    "grammar": lambda value, place: {"type": "grammar", "grammar": value},
}
