"""Regular expressions of strings, as the grammar takes them: which it follows to the letter, and those of formats.

xgrammar (0.2) matches whole texts, skips anchors wherever they stand, and in a JSON string writes the letters of a
pattern as they are, also those that JSON must escape. What it does not know (look-around, back references, flags) it
refuses itself.
"""

from __future__ import annotations

import re

_YEAR = r"[1-9][0-9]{3}"
_LEAP_YEAR = r"([1-9][0-9](0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-(((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01]))|((0[469]|11)-(0[1-9]|[12][0-9]|30))"
    rf"|(02-(0[1-9]|1[0-9]|2[0-8])))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HEX = "[0-9a-f]"
_GROUP = f"{_HEX}{{1,4}}"
_IPV6 = "|".join(
    [rf"({_GROUP}:){{7}}{_GROUP}", rf"({_GROUP}:){{1,7}}:", rf":((:{_GROUP}){{1,7}}|:)"]
    + [rf"({_GROUP}:){{1,{7 - behind}}}(:{_GROUP}){{1,{behind}}}" for behind in range(1, 7)]
)

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": _IPV6,
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
}
"""Patterns that are stricter than xgrammar's own, which lets a 31st of February through; years begin with 1000."""

OTHER_FORMATS = ("duration", "email", "hostname", "uri")
"""Left to xgrammar."""

_TOKEN = re.compile(r"\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\u\{[0-9A-Fa-f]+\}|\\c[A-Za-z]|\\.|.", re.DOTALL)
_CONTROLS = "abfnrtve0"


def length_pattern(least: int, most: int | None) -> str:
    """Of strings of so many characters, none of them escaped, and no halves of UTF-16's pairs."""
    return rf"^[ !#-\[\]-\uD7FF\uE000-\u{{10FFFF}}]{{{least},{'' if most is None else most}}}$"


def pattern_fault(pattern: str, in_json: bool) -> str:
    """ "" or what the grammar would not follow. in_json: the pattern is of a string in JSON."""
    depth, in_class, begins = 0, False, True
    tokens = [found.group() for found in _TOKEN.finditer(pattern)]
    for place, token in enumerate(tokens):
        if in_class:
            in_class = token != "]"
            continue
        follows = tokens[place + 1] if place + 1 < len(tokens) else "|"
        if token == "^" and not (begins and depth == 0):
            return "'^' is followed only where an alternative of the whole pattern begins"
        if token == "$" and not (follows == "|" and depth == 0):
            return "'$' is followed only where an alternative of the whole pattern ends"
        if in_json and _escaped_in_json(token):
            return f"{token!r} outside brackets is a character that JSON escapes, which no pattern can ask for here"
        in_class = token == "["
        depth += (token == "(") - (token == ")")
        begins = token == "|"
    return ""


def _escaped_in_json(token: str) -> bool:
    """Whether a part of a pattern stands for a quote, a backslash or a control character."""
    if token[0] != "\\" or len(token) == 1:
        return token == '"' or token < " "
    kind, digits = token[1], token[2:].strip("{}")
    if kind in "xu" and digits:
        return chr(min(int(digits, 16), 0x10FFFF)) in '"\\' or int(digits, 16) < 0x20
    return kind in '"\\' + _CONTROLS or (kind == "c" and len(token) == 3)
