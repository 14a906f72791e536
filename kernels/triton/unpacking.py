"""INT4 times its integer multipliers to INT8, four values an instruction."""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _as_bytes(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 [ROWS, COLUMNS] -> the int8 [ROWS, 4 * COLUMNS] of their bytes; compilers fold this to nothing."""
    first, second = words.to(tl.int8), (words >> 8).to(tl.int8)
    third, fourth = (words >> 16).to(tl.int8), (words >> 24).to(tl.int8)
    return tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(ROWS, 4 * COLUMNS)


@triton.jit
def unpacked(nibbles, multiplier, ROWS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr = 32):
    """nibbles int32 [ROWS, WORDS], four offset-binary values each in the low halves of their bytes, times multiplier
    int32 [ROWS, GROUPS] of WORDS / GROUPS words each -> int8 [ROWS, 4 * WORDS].

    Four values a multiplication: byte * m + (128 - 8 * m) stays within 8..233, so no byte carries into the next, and
    flipping the top bits makes the bytes two's complement. The multiplier may reach the words by broadcasting alone:
    anything else sends each unpacked tile through shared memory again.
    """
    offset = multiplier * -0x08080808 + -0x7F7F7F80
    multiplier = tl.broadcast_to(multiplier[:, :, None], (ROWS, GROUPS, WORDS // GROUPS)).reshape(ROWS, WORDS)
    offset = tl.broadcast_to(offset[:, :, None], (ROWS, GROUPS, WORDS // GROUPS)).reshape(ROWS, WORDS)
    return _as_bytes((nibbles * multiplier + offset) ^ -0x7F7F7F80, ROWS, WORDS)
