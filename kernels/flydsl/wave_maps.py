"""Where a wave of 64 lanes has what, for `v_mfma_i32_16x16x32_i8`: one description for kernel, layout and proof.

Weights are the left factor: a tile of 16 rows. A lane l has row l % 16 and, of each piece of K, the part l // 16; 16
activations are the right factor, whose token is l % 16. The result's register i has row 4 * (l // 16) + i and token
l % 16 (AMD's CDNA3 ISA guide, 7.1.4). The instruction sums over all k that both factors have at the same place,
whatever their order, so a piece is laid out as it is read: 16 bytes a lane, 1 KiB a wave in one run.

INT4: a piece is 128 values of K and a lane's 16 bytes are one group of 32 with one multiplier. INT8: 64 values.

All functions are plain arithmetic: on integers, on NumPy arrays of lanes, and on values of FlyDSL while it traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

WAVE = 64
ROWS = 16
"""Rows of a tile, and tokens of one."""
TILES = 2
"""Tiles of rows that a wave multiplies with the same activations: gate and up, or two neighbours."""
LANE_WORDS = 4
"""Words of 32 bits of a lane in one piece."""
PIECE = {4: 128, 8: 64}
"""Values of K in a piece, by bits of a weight."""
LANE_VALUES = {4: 32, 8: 16}
"""Of them in one lane."""

NIBBLES = 0x0F0F0F0F
SIGNS = 0x80808080
_PAIR = 0x0101

V = TypeVar("V")


def lane_row(lane: V) -> V:
    """Lane -> its row of the left factor's tile; or its token, of the right factor's and of the result's."""
    return lane % ROWS  # type: ignore[operator]


def lane_part(lane: V) -> V:
    """Lane -> the part of a piece that it has, 0..3."""
    return lane // ROWS  # type: ignore[operator]


def result_row(lane: V, register: int) -> V:
    """Lane and register 0..3 of a result -> the row in the tile."""
    return lane_part(lane) * 4 + register  # type: ignore[operator]


def multiplier(packed: V, piece: int) -> V:
    """A lane's multipliers of 4 pieces, 4 bits each -> that of a piece."""
    return (packed >> (4 * (piece % 4))) & 15  # type: ignore[operator]


def offset(factor: V) -> V:
    """A multiplier u -> what `unpacked` adds to each byte n * u: 128 - 8 * u, in two bytes."""
    return (factor * -8 + 128) * _PAIR  # type: ignore[operator]


def unpacked(word: V, factor: V, added: V, multiply_add: Callable[[V, V, V], V]) -> tuple[V, V]:
    """8 offset-binary nibbles n -> (n - 8) * u as signed bytes: those of the low nibbles, those of the high ones.

    multiply_add(x, u, c): x * u + c in each half of 16 bits, of u and c the low half in both (`v_pk_mad_u16`). A byte
    n * u + 128 - 8 * u is in 8..233, so that no byte carries into the next; its sign bit is flipped.
    """
    low = multiply_add(word & NIBBLES, factor, added) ^ SIGNS  # type: ignore[operator]
    high = multiply_add((word >> 4) & NIBBLES, factor, added) ^ SIGNS  # type: ignore[operator]
    return low, high


def activation_words(first: list[V], second: list[V]) -> tuple[list[V], list[V]]:
    """The 32 activations of an INT4 group, k = 0..15 and 16..31 in 4 words each, as the two runs that lanes read.

    Words i of both meet in one instruction, for the nibbles of a word are k and k + 16 of its group."""
    return [first[0], second[0], first[1], second[1]], [first[2], second[2], first[3], second[3]]
