"""Which JSON schemas the grammar enforces to the letter; any other is refused, with the place and the reason.

xgrammar (0.2) takes keywords that it then ignores, or of which it ignores all but one where several stand together. So
only keywords are let through, alone or together, for which answers were found to be valid (tests/cluster/front/
test_json_schema.py walks at random through the grammar of each). Some are written anew: an object that names no
properties may have any; `oneOf` of which at most one can fit is `anyOf`; lengths and some formats are patterns, since
xgrammar lets raw control characters into strings of a given length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from .string_pattern import FORMATS, OTHER_FORMATS, length_pattern, pattern_fault

Schema = dict[str, Any]

_NOTES = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "$schema",
        "$comment",
        "deprecated",
        "readOnly",
        "writeOnly",
        "discriminator",
        "$defs",
        "definitions",
    ]
)
_NUMBER = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"])
_KEYWORDS = {
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "integer": _NUMBER,
    "number": _NUMBER,
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems", "uniqueItems"]),
    "object": frozenset(
        [
            "properties",
            "required",
            "additionalProperties",
            "unevaluatedProperties",
            "patternProperties",
            "propertyNames",
            "minProperties",
            "maxProperties",
        ]
    ),
}
# One of these says all of a schema: beside it xgrammar ignores every other keyword.
_WHOLE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_MOST_DEPTH = 64
_LARGEST = 2**53
"""Integers that are the same as a float: bounds beyond it are not exact."""


class SchemaFault(ValueError):
    """A schema that cannot be enforced. place: where in it, "" at its root; reason: what is wrong there."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}" if place else reason)
        self.place, self.reason = place, reason


def enforceable(schema: Any) -> Any:
    """The schema as the grammar takes it, with the same meaning. Raises SchemaFault."""
    return _Reader(schema).read(schema, "", 0)


class _Reader:
    """root: the whole schema, in which `$ref` points."""

    def __init__(self, root: Any) -> None:
        self._root = root

    def read(self, schema: Any, place: str, depth: int) -> Any:
        if depth > _MOST_DEPTH:
            raise SchemaFault(place, f"nested more than {_MOST_DEPTH} deep")
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise SchemaFault(place, f"must be an object, or true, found {_shown(schema)}")

        def inner(value: Any, *names: str | int) -> Any:
            return self.read(value, _joined(place, *names), depth + 1)

        definitions = {
            name: {key: inner(value, name, key) for key, value in self._object(schema, place, name).items()}
            for name in ("$defs", "definitions")
            if name in schema
        }
        said = {name: value for name, value in schema.items() if name not in _NOTES}
        return self._said(said, place, inner) | definitions

    def _said(self, said: Schema, place: str, inner: Callable[..., Any]) -> Schema:
        """A schema but for its notes and definitions."""
        whole = [name for name in _WHOLE if name in said]
        if not whole:
            return self._typed(said, place, inner)
        name = whole[0]
        beside = set(said) - {name} - ({"type"} if name in ("enum", "const") else set())
        if beside:
            raise SchemaFault(
                _joined(place, min(beside)), f"is ignored beside '{name}'; leave it out, or put it inside"
            )
        if name == "$ref":
            return self._reference(said[name], place)
        if name in ("enum", "const"):
            return self._values(said, name, place)
        branches = said[name]
        if not isinstance(branches, list) or not branches:
            raise SchemaFault(_joined(place, name), "must be a list of at least one schema")
        if name == "allOf" and len(branches) > 1:
            raise SchemaFault(_joined(place, name), "of several schemas is not enforced; write one that says it all")
        if name == "oneOf":
            self._check_apart(branches, _joined(place, name))
        read = [inner(branch, name, index) for index, branch in enumerate(branches)]
        return read[0] if name == "allOf" else {"anyOf": read}

    def _reference(self, pointer: Any, place: str) -> Schema:
        seen = {pointer if isinstance(pointer, str) else ""}
        waiting = [self._target(pointer, place)]
        while waiting:  # one that leads to itself, with nothing of a text in between, describes nothing
            for other in _in_place(waiting.pop()):
                if other == pointer:
                    raise SchemaFault(_joined(place, "$ref"), f"{pointer!r} leads to itself and to nothing else")
                if other not in seen:
                    seen.add(other)
                    waiting.append(self._target(other, place))
        return {"$ref": pointer}

    def _target(self, pointer: Any, place: str) -> Any:
        """What a reference means. Only definitions and the root are looked for, which `read` has checked."""
        parts = pointer.split("/") if isinstance(pointer, str) else []
        if parts == ["#"]:
            return self._root
        if (
            len(parts) == 3
            and parts[0] == "#"
            and parts[1] in ("$defs", "definitions")
            and isinstance(self._root, dict)
        ):
            found = self._root.get(parts[1])
            if isinstance(found, dict) and parts[2] in found and not set(parts[2]) & set("~%"):
                return found[parts[2]]
        where = "'#', '#/$defs/NAME' or '#/definitions/NAME' that is there"
        raise SchemaFault(_joined(place, "$ref"), f"must be {where}, found {_shown(pointer)}")

    def _values(self, said: Schema, name: str, place: str) -> Schema:
        values = said[name] if name == "enum" else [said[name]]
        where = _joined(place, name)
        if not isinstance(values, list) or not values:
            raise SchemaFault(where, "must be a list of at least one value")
        kinds = self._types(said, place) if "type" in said else ()
        for value in values:
            if kinds and not any(_is_of(value, kind) for kind in kinds):
                raise SchemaFault(where, f"{_shown(value)} is not of type {' or '.join(kinds)}")
        return {name: said[name]}

    def _types(self, said: Schema, place: str) -> tuple[str, ...]:
        kinds = said["type"] if isinstance(said["type"], list) else [said["type"]]
        if not kinds or not all(isinstance(kind, str) and kind in _KEYWORDS for kind in kinds):
            known = ", ".join(_KEYWORDS)
            raise SchemaFault(_joined(place, "type"), f"must be one or a list of {known}, found {_shown(said['type'])}")
        return tuple(kinds)

    def _typed(self, said: Schema, place: str, inner: Callable[..., Any]) -> Schema:
        if not said:
            return {}
        if "type" not in said:
            owners = [kind for kind in ("object", "array") if set(said) <= _KEYWORDS[kind]]
            if not owners:
                unknown = [name for name in said if not any(name in known for known in _KEYWORDS.values())]
                self._refuse_unknown(unknown, place)
                raise SchemaFault(place, f"needs a 'type' beside {', '.join(map(repr, said))}")
            said = {"type": owners[0]} | said
        kinds = self._types(said, place)
        self._refuse_unknown(set(said) - {"type"} - frozenset().union(*(_KEYWORDS[kind] for kind in kinds)), place)
        result = dict(said)
        for kind in kinds:
            if kind in ("integer", "number"):
                _check_number(result, kind, place)
            elif kind == "string":
                result = _string(result, place)
            elif kind == "array":
                result = self._array(result, place, inner)
            elif kind == "object":
                result = self._object_type(result, place, inner)
        return result

    @staticmethod
    def _refuse_unknown(names: Any, place: str) -> None:
        for name in sorted(names):
            raise SchemaFault(_joined(place, name), "is not enforced here; leave it out")

    def _array(self, said: Schema, place: str, inner: Callable[..., Any]) -> Schema:
        result = dict(said)
        if result.pop("uniqueItems", False) is not False:
            raise SchemaFault(_joined(place, "uniqueItems"), "is not enforced; leave it out")
        _check_counts(said, place, "minItems", "maxItems")
        if isinstance(said.get("items"), dict):
            result["items"] = inner(said["items"], "items")
        elif not isinstance(said.get("items", True), bool):
            raise SchemaFault(_joined(place, "items"), "must be a schema; for a list of schemas use 'prefixItems'")
        if "prefixItems" in said:
            if not isinstance(said["prefixItems"], list) or not said["prefixItems"]:
                raise SchemaFault(_joined(place, "prefixItems"), "must be a list of at least one schema")
            read = [inner(item, "prefixItems", index) for index, item in enumerate(said["prefixItems"])]
            result["prefixItems"] = read
        return result

    def _object_type(self, said: Schema, place: str, inner: Callable[..., Any]) -> Schema:
        result = dict(said)
        properties = self._object(said, place, "properties")
        patterns = self._object(said, place, "patternProperties")
        if properties:
            result["properties"] = {key: inner(value, "properties", key) for key, value in properties.items()}
        if result.pop("unevaluatedProperties", False) is not False:
            raise SchemaFault(_joined(place, "unevaluatedProperties"), "can only be false")
        self._check_required(said, properties, place)
        _check_counts(said, place, "minProperties", "maxProperties")
        if said.get("minProperties", 0) <= len(said.get("required", ())):
            result.pop("minProperties", None)
        elif patterns or said.get("additionalProperties", not properties) is not False:
            reason = "is enforced only where 'additionalProperties' is false: a name could come twice"
            raise SchemaFault(_joined(place, "minProperties"), reason)
        if patterns:
            beside = {"properties", "additionalProperties", "propertyNames"} & set(said)
            if len(patterns) > 1 or (beside and said.get("additionalProperties") is not False) or properties:
                reason = "is enforced for one pattern alone, without 'properties', 'propertyNames' or additional ones"
                raise SchemaFault(_joined(place, "patternProperties"), reason)
            where = _joined(place, "patternProperties")
            result["patternProperties"] = {
                _pattern(key, where): inner(value, "patternProperties", key) for key, value in patterns.items()
            }
            return result
        more = said.get("additionalProperties", not properties)
        if isinstance(more, dict):
            result["additionalProperties"] = inner(more, "additionalProperties")
        elif isinstance(more, bool):
            result["additionalProperties"] = more
        else:
            raise SchemaFault(_joined(place, "additionalProperties"), "must be a schema, true or false")
        if "propertyNames" in said:
            if properties:
                raise SchemaFault(_joined(place, "propertyNames"), "is not enforced beside 'properties'; leave it out")
            names, where = said["propertyNames"], _joined(place, "propertyNames")
            if not isinstance(names, dict) or [*names] != ["pattern"] or not isinstance(names["pattern"], str):
                raise SchemaFault(where, "can only hold a 'pattern'")
            _pattern(names["pattern"], where)
            del result["additionalProperties"]
            if more not in (True, {}):
                raise SchemaFault(where, "is not enforced beside 'additionalProperties'")
        return result

    @staticmethod
    def _object(said: Schema, place: str, name: str) -> Schema:
        value = said.get(name, {})
        if not isinstance(value, dict):
            raise SchemaFault(_joined(place, name), f"must be an object, found {_shown(value)}")
        return value

    @staticmethod
    def _check_required(said: Schema, properties: Schema, place: str) -> None:
        required, where = said.get("required", []), _joined(place, "required")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise SchemaFault(where, "must be a list of names")
        unknown = [name for name in required if name not in properties]
        if unknown:
            raise SchemaFault(where, f"{unknown[0]!r} is not among 'properties', where its schema must stand")

    def _check_apart(self, branches: list[Any], place: str) -> None:
        """That no value fits two of the branches of a `oneOf`, as far as types, constants and tags tell."""
        for (i, one), (j, other) in combinations(enumerate(branches), 2):
            if not self._apart(self._followed(one, place), self._followed(other, place)):
                reason = (
                    f"schemas {i} and {j} may both fit a value, which is not enforced: give them different types, or a "
                    "required property with a different 'const' in each, or use 'anyOf'"
                )
                raise SchemaFault(place, reason)

    def _followed(self, schema: Any, place: str) -> Schema:
        for _ in range(_MOST_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self._target(schema["$ref"], place)
        return schema if isinstance(schema, dict) else {}

    def _apart(self, one: Schema, other: Schema) -> bool:
        kinds, others = _kinds(one), _kinds(other)
        if kinds and others and not kinds & others:
            return True
        values, more = _constants(one), _constants(other)
        if values is not None and more is not None:
            return not any(value == known for value in values for known in more)
        tags = [_tags(each) for each in (one, other)]
        shared = tags[0].keys() & tags[1].keys()
        return any(not any(value == known for value in tags[0][name] for known in tags[1][name]) for name in shared)


def _in_place(schema: Any) -> Iterator[Any]:
    """The references that stand for a whole schema, or for one that may be it."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"]
        for name in ("anyOf", "oneOf", "allOf"):
            for branch in schema.get(name) or ():
                yield from _in_place(branch)


def _kinds(schema: Schema) -> set[str]:
    """The types of all that fits a schema; empty where it does not say."""
    values = _constants(schema)
    if values is not None:
        return {kind for value in values for kind in _KEYWORDS if kind != "integer" and _is_of(value, kind)}
    found = schema.get("type", [])
    return {"number" if kind == "integer" else kind for kind in ([found] if isinstance(found, str) else found)}


def _constants(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _tags(schema: Schema) -> dict[str, list[Any]]:
    """The required properties that are one of some constants."""
    properties, required = schema.get("properties"), schema.get("required")
    if schema.get("type") != "object" or not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    found = {name: _constants(each) for name, each in properties.items() if name in required and isinstance(each, dict)}
    return {name: values for name, values in found.items() if values is not None}


def _is_of(value: Any, kind: str) -> bool:
    if kind == "integer":
        return type(value) is int or (type(value) is float and value.is_integer())
    types = {"string": str, "number": (int, float), "boolean": bool, "null": type(None), "array": list, "object": dict}
    return isinstance(value, types[kind]) and (kind != "number" or not isinstance(value, bool))


def _string(said: Schema, place: str) -> Schema:
    _check_counts(said, place, "minLength", "maxLength")
    asked = [name for name in ("pattern", "format", "minLength", "maxLength") if name in said]
    result = {name: value for name, value in said.items() if name not in asked}
    if not asked:
        return result
    kind, value = asked[0], said[asked[0]]
    if kind in ("pattern", "format"):
        if len(asked) > 1:
            raise SchemaFault(_joined(place, asked[1]), f"is ignored beside '{kind}'; leave one of them out")
        if not isinstance(value, str):
            raise SchemaFault(_joined(place, kind), f"must be a string, found {_shown(value)}")
    if kind == "pattern":
        return result | {"pattern": _pattern(value, _joined(place, "pattern"))}
    if kind != "format":
        return result | {"pattern": length_pattern(said.get("minLength", 0), said.get("maxLength"))}
    if value in FORMATS:
        return result | {"pattern": FORMATS[value]}
    if value not in OTHER_FORMATS:
        known = ", ".join(sorted((*FORMATS, *OTHER_FORMATS)))
        raise SchemaFault(_joined(place, "format"), f"{_shown(value)} is not enforced; known are {known}")
    return result | {"format": value}


def _pattern(pattern: Any, place: str) -> str:
    fault = pattern_fault(pattern, in_json=True)
    if fault:
        raise SchemaFault(place, fault)
    return pattern


def _check_number(said: Schema, kind: str, place: str) -> None:
    for name in _NUMBER & set(said):
        value, where = said[name], _joined(place, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SchemaFault(where, f"must be a number, found {_shown(value)}")
        if abs(value) > _LARGEST:
            raise SchemaFault(where, f"must be from -2^53 to 2^53, found {_shown(value)}")
        if (kind == "integer" or name == "multipleOf") and not float(value).is_integer():
            raise SchemaFault(where, f"must be a whole number here, found {_shown(value)}")
        if float(value).is_integer():
            said[name] = int(value)
    if "multipleOf" in said:
        if kind == "number" or said["multipleOf"] < 1:
            raise SchemaFault(_joined(place, "multipleOf"), "is enforced for type integer and from 1 on")
        if len(_NUMBER & set(said)) > 1:
            raise SchemaFault(_joined(place, "multipleOf"), "is not enforced beside bounds; leave one out")


def _check_counts(said: Schema, place: str, least: str, most: str) -> None:
    for name in (least, most):
        value = said.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SchemaFault(_joined(place, name), f"must be a whole number from 0 on, found {_shown(value)}")
    if said.get(least, 0) > said.get(most, math.inf):
        raise SchemaFault(_joined(place, least), f"{said[least]} is more than '{most}' {said[most]}")


def _joined(place: str, *names: str | int) -> str:
    return ".".join(filter(None, (place, *map(str, names))))


def _shown(value: Any) -> str:
    return repr(value)[:40]
