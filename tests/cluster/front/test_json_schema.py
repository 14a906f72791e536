"""Each feature of JSON schemas is enforced or refused: ways at random through the grammar, jsonschema as the oracle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from grammar_walk import GrammarWalker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.front.json_schema import SchemaFault, enforceable

WALKS = 8


@pytest.fixture(scope="module")
def walker() -> Iterator[GrammarWalker]:
    walker = GrammarWalker(DEMO_MODEL)
    yield walker
    walker.book.close()


def record(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **more}


NULL, WHOLE = {"type": "null"}, {"type": "integer"}
LIST = record({"v": NULL, "n": {"anyOf": [{"$ref": "#/$defs/L"}, NULL]}}, required=["v", "n"])
TAGGED = [record({"k": {"const": tag}, "x": NULL}, required=["k"]) for tag in ("a", "b")]
ENFORCED = {
    "any": {},
    "true": True,
    "free object": {"type": "object"},
    "notes": {"title": "t", "description": "d", "default": 1, "examples": [2], "$schema": "s", "type": "integer"},
    "types": {"type": ["object", "null", "boolean"], "properties": {"a": NULL}, "required": ["a"]},
    "no type": {"properties": {"a": NULL}, "required": ["a"]},
    "enum": {"enum": ["a", 1, None, {"a": [1, 'é"\\\n']}, 1.5, True]},
    "enum of a type": {"type": "string", "enum": ["a", 'b"\u2028']},
    "const": {"const": {"a": [1]}},
    "anyOf": {"anyOf": [WHOLE, NULL]},
    "oneOf of types": {"oneOf": [WHOLE, {"type": "string"}]},
    "oneOf of tags": {"oneOf": TAGGED, "discriminator": {"propertyName": "k"}},
    "oneOf of references": {"oneOf": [{"$ref": "#/$defs/A"}, NULL], "$defs": {"A": WHOLE}},
    "allOf of one": {"allOf": [WHOLE]},
    "$ref": {"$ref": "#/definitions/A", "definitions": {"A": WHOLE}},
    "$ref to itself": {"$ref": "#/$defs/L", "$defs": {"L": LIST}},
    "$ref to the root": record({"n": {"$ref": "#"}}),
    "integer": {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
    "integer, one bound": {"type": "integer", "exclusiveMinimum": 17},
    "multipleOf": {"type": "integer", "multipleOf": 7},
    "number": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "number, open": {"type": "number", "exclusiveMinimum": 0.5, "exclusiveMaximum": 7},
    "minLength": {"type": "string", "minLength": 3},
    "maxLength": {"type": "string", "maxLength": 4},
    "lengths": {"type": "string", "minLength": 1, "maxLength": 2},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
    "pattern in the middle": {"type": "string", "pattern": "b+"},
    "pattern with all of ASCII": {"type": "string", "pattern": r"^[\x00-\x7f]{3}$"},
    "pattern with what is not": {"type": "string", "pattern": "^[^a]{3}$"},
    "pattern of alternatives": {"type": "string", "pattern": "^a$|^b$"},
    "items": {"type": "array", "items": NULL, "minItems": 1, "maxItems": 3},
    "no items": {"type": "array", "items": False},
    "prefixItems": {"type": "array", "prefixItems": [WHOLE, NULL], "items": {"type": "boolean"}, "minItems": 3},
    "required": record({"a": WHOLE, "b": NULL}, required=["b"]),
    "additionalProperties": record({"a": WHOLE}, required=["a"], additionalProperties={"type": "boolean"}),
    "no additionalProperties": record({"a": WHOLE}, additionalProperties=False),
    "property names to escape": record({'a"\\\n': NULL, "é": NULL, "": NULL}, required=['a"\\\n', "é", ""]),
    "counted properties": record({"a": NULL, "b": NULL, "c": NULL}, minProperties=2, maxProperties=2),
    "maxProperties": {"type": "object", "maxProperties": 1},
    "patternProperties": {"type": "object", "patternProperties": {"^x_[0-9]$": WHOLE}, "additionalProperties": False},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^[a-c]$"}},
    "unevaluatedProperties": record({"a": NULL}, unevaluatedProperties=False),
    **{
        f"format {name}": {"type": "string", "format": name}
        for name in ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
    },
}
REFUSED = [
    (False, "must be an object, or true"),
    ([], "must be an object, or true"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems: is not enforced"),
    ({"type": "array", "contains": WHOLE}, "contains: is not enforced"),
    ({"type": "array", "items": [WHOLE]}, "items: must be a schema; for a list of schemas use 'prefixItems'"),
    ({"type": "array", "prefixItems": []}, "prefixItems: must be a list"),
    ({"type": "array", "minItems": 2, "maxItems": 1}, "minItems: 2 is more than 'maxItems' 1"),
    ({"type": "string", "pattern": "a", "minLength": 1}, "minLength: is ignored beside 'pattern'"),
    ({"type": "string", "pattern": "a", "format": "date"}, "format: is ignored beside 'pattern'"),
    ({"type": "string", "format": "regex"}, "format: 'regex' is not enforced; known are date"),
    ({"type": "string", "pattern": 'a"b'}, "is a character that JSON escapes"),
    ({"type": "string", "pattern": r"a\\b"}, "is a character that JSON escapes"),
    ({"type": "string", "pattern": r"a\nb"}, "is a character that JSON escapes"),
    ({"type": "string", "pattern": r"a\x22b"}, "is a character that JSON escapes"),
    ({"type": "string", "pattern": "a^b"}, "'^' is followed only where"),
    ({"type": "string", "pattern": "(a$)b"}, "'$' is followed only where"),
    ({"type": "string", "minLength": -1}, "minLength: must be a whole number"),
    ({"type": "string", "contentEncoding": "base64"}, "contentEncoding: is not enforced here"),
    ({"type": "integer", "maximum": 2**60}, "maximum: must be from -2^53"),
    ({"type": "integer", "minimum": 0.5}, "minimum: must be a whole number"),
    ({"type": "integer", "multipleOf": 3, "minimum": 4}, "multipleOf: is not enforced beside bounds"),
    ({"type": "number", "multipleOf": 3}, "multipleOf: is enforced for type integer"),
    ({"type": "integer", "minLength": 3}, "minLength: is not enforced here"),
    ({"type": "text"}, "type: must be one or a list of string, integer"),
    ({"minimum": 3}, "needs a 'type' beside 'minimum'"),
    ({"type": "string", "nullable": True}, "nullable: is not enforced here"),
    ({"enum": []}, "enum: must be a list of at least one value"),
    ({"type": "string", "enum": ["a", 1]}, "enum: 1 is not of type string"),
    ({"type": "integer", "const": True}, "const: True is not of type integer"),
    ({"anyOf": [WHOLE, NULL], "minimum": 4}, "minimum: is ignored beside 'anyOf'"),
    ({"anyOf": []}, "anyOf: must be a list of at least one schema"),
    ({"anyOf": [{"anyOf": [{"not": WHOLE}]}]}, "anyOf.0.anyOf.0.not: is not enforced"),
    ({"oneOf": [WHOLE, {"type": "number"}]}, "oneOf: schemas 0 and 1 may both fit a value"),
    ({"oneOf": [{"const": 1}, {"enum": [2, 1]}]}, "oneOf: schemas 0 and 1 may both fit"),
    ({"oneOf": [TAGGED[0], TAGGED[0]]}, "oneOf: schemas 0 and 1 may both fit"),
    ({"allOf": [WHOLE, {"minimum": 3}]}, "allOf: of several schemas is not enforced"),
    ({"$ref": "#/$defs/X"}, "$ref: must be '#', '#/$defs/NAME'"),
    ({"$ref": "http://a/b"}, "$ref: must be '#'"),
    ({"$ref": "#"}, "'#' leads to itself"),
    ({"$ref": "#/$defs/A", "$defs": {"A": {"anyOf": [NULL, {"$ref": "#/$defs/A"}]}}}, "leads to itself"),
    ({"$ref": "#/$defs/A", "minimum": 3, "$defs": {"A": WHOLE}}, "minimum: is ignored beside '$ref'"),
    ({"$defs": {"A": {"$anchor": "a", "type": "null"}}, "type": "null"}, "$defs.A.$anchor: is not enforced"),
    ({"if": WHOLE, "then": NULL}, "if: is not enforced here"),
    (record({"a": NULL}, required=["b"]), "required: 'b' is not among 'properties'"),
    (record({"a": NULL}, dependentRequired={"a": []}), "dependentRequired: is not enforced"),
    (record({"a": {"type": "array", "items": {"not": {}}}}), "properties.a.items.not: is not enforced"),
    (record({"a": NULL}, patternProperties={"b": NULL}), "patternProperties: is enforced for one pattern alone"),
    (record({"a": NULL}, propertyNames={"pattern": "a"}), "propertyNames: is not enforced beside 'properties'"),
    ({"type": "object", "minProperties": 1}, "minProperties: is enforced only where"),
    (record({}, additionalProperties=3), "additionalProperties: must be a schema"),
    (record({"a": NULL}, unevaluatedProperties=NULL), "unevaluatedProperties: can only be false"),
    ({"properties": []}, "properties: must be an object"),
]


def check(walker: GrammarWalker, schema: Any, walks: int) -> None:
    """That all that the schema's grammar lets through is JSON of the schema."""
    grammar = walker.format(enforceable(schema))
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    finished = 0
    for seed in range(walks):
        tokens, finish = walker.walk(grammar, seed)
        assert finish in ("stop", "length"), finish
        if finish == "stop":
            text = walker.tokenizer.decode(tokens)
            finished += 1
            validator.validate(json.loads(text))
    assert finished


@pytest.mark.parametrize("name", ENFORCED)
def test_a_feature_is_enforced(walker: GrammarWalker, name: str) -> None:
    check(walker, ENFORCED[name], WALKS)


@pytest.mark.parametrize(("schema", "says"), REFUSED)
def test_what_would_be_ignored_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(SchemaFault) as caught:
        enforceable(schema)
    assert says in str(caught.value)


NAMES = st.sampled_from(["a", "b c", 'd"', "é", "longer_name"])
LEAVES = st.sampled_from(
    [
        NULL,
        {"type": "boolean"},
        {"type": "integer", "minimum": -5, "maximum": 400},
        {"type": "number", "minimum": 0, "maximum": 3},
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": "^[a-f]{2}[0-9]?$"},
        {"type": "string", "format": "date"},
        {"enum": ["x", 3, None]},
        {"const": "c"},
    ]
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def some(properties: dict[str, Any], count: int, more: Any) -> Any:
        return record(properties, required=[*properties][:count], additionalProperties=more)

    lists = st.tuples(inner, st.integers(0, 2)).map(
        lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": 3}
    )
    objects = st.builds(some, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 3), st.just(False) | inner)
    return lists | objects | st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each})


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=st.recursive(LEAVES, _nested, max_leaves=6))
def test_schemas_of_schemas_are_enforced(walker: GrammarWalker, schema: Any) -> None:
    check(walker, schema, 3)
