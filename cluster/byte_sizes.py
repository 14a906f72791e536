"""Sizes as people write them: "512 MiB", "60GiB", "1.5 GB"."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z]+)\s*")


def parse_bytes(text: str) -> int | None:
    """Whole bytes of a number with a unit, in any case of letters; None for anything else."""
    match = _SIZE.fullmatch(text)
    if match is None or (unit := _UNITS.get(match["unit"].upper())) is None:
        return None
    return math.floor(Fraction(match["number"]) * unit)
