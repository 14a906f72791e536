"""The operations of the CPU library as 64-bit words: a code, then the arguments; `commands.cpp` has the same order.

Each function here takes an operation's arguments, addresses and integers as int and real numbers as float, and returns
its words. Words behind one another are a list of operations, which one call of `CpuHandle.run` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from struct import Struct

WORD = 8
"""Bytes."""

Command = Callable[..., bytes]


def _command(code: int, arguments: str) -> Command:
    """arguments: one letter each, q an address or an integer, d a real number."""
    return partial(Struct(f"=q{arguments}").pack, code)


rms_norm = _command(0, "qqqqqqqdqq")
linear = _command(1, "qqqqqqqqqqq")
integer_linear = _command(2, "qqqqqqqqqqq")
rope = _command(3, "qqqqqqqqqqq")
write_kv = _command(4, "qqqqqqdqqqqqqqqq")
attention = _command(5, "qqqqqqqqqqqqqqqqd")
gate = _command(6, "qqqqqqqqqqqqqd")
quantize = _command(7, "qqqqqq")
silu_mul = _command(8, "qqqq")
combine = _command(9, "qqqqqqqq")
experts = _command(10, "qqqqqqqqqqqqqqqqqq")
fold = _command(11, "qqqqqqqqqqqqq")
row_scales = _command(12, "qqqqqqdqqqq")
group_scales = _command(13, "qqqqqqdqqqq")
round_weights = _command(14, "qqqqqqqdd")
take_rows = _command(15, "qqqqqqq")
sample = _command(16, "qqqqqqqqqqq")
convert = _command(17, "qqqqqqqqqqqqq")
