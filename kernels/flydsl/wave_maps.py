"""Where a wave of 64 lanes has what, for `v_mfma_i32_16x16x32_i8`: one description for kernel, layout and proof.

Weights are the left factor: a tile of 16 rows. A lane l has row l % 16 and, of each piece of K, the part l // 16; 16
activations are the right factor, whose token is l % 16. The result's register i has row 4 * (l // 16) + i and token
l % 16 (AMD's CDNA3 ISA guide, 7.1.4). The instruction sums over all k that both factors have at the same place,
whatever their order, so a piece is laid out as it is read: 16 bytes a lane, 1 KiB a wave in one run.

INT4: a piece is 128 values of K and a lane's 16 bytes are one group of 32 with one multiplier. INT8: 64 values.
Activations come in units of 16 bytes along K: of a piece 8 for INT4, two a lane, and 4 for INT8.

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
LANE_BYTES = 4 * LANE_WORDS
PIECE = {4: 128, 8: 64}
"""Values of K in a piece, by bits of a weight."""
RUNS = {4: 2, 8: 1}
"""Units of activations that go with a lane's 16 bytes of weights."""
PACKED = 4
"""Pieces whose multipliers are in one word of 16 bits."""

NIBBLES = 0x0F0F0F0F
SIGNS = 0x80808080

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
    return (packed >> (4 * (piece % PACKED))) & 15  # type: ignore[operator]


def offset(factor: V) -> V:
    """A multiplier u -> what `unpacked` adds to each byte n * u: 128 - 8 * u, in the two bytes of 16 bits."""
    return factor * -0x0808 + 0x8080  # type: ignore[operator]


def unpacked(word: V, factor: V, added: V, multiply_add: Callable[[V, V, V], V]) -> tuple[V, V]:
    """8 offset-binary nibbles n -> (n - 8) * u as signed bytes: those of the low nibbles, those of the high ones.

    multiply_add(x, u, c): x * u + c in each half of 16 bits, of u and c the low half in both (`v_pk_mad_u16`). A byte
    n * u + 128 - 8 * u is in 8..233, so that no byte carries into the next; its sign bit is flipped.
    """
    low = multiply_add(word & NIBBLES, factor, added) ^ SIGNS  # type: ignore[operator]
    high = multiply_add((word >> 4) & NIBBLES, factor, added) ^ SIGNS  # type: ignore[operator]
    return low, high


def left_pairs(words: list[V], unpack: Callable[[V], tuple[V, V]] | None) -> list[list[V]]:
    """A lane's 4 words of weights as the left factors of its instructions, two words each. unpack: `unpacked`, of INT4,
    whose nibbles of a group are k = 0..15 in the low and 16..31 in the high halves of its bytes."""
    pairs = [words[:2], words[2:]]
    if unpack is None:
        return pairs
    halves = [[unpack(word) for word in pair] for pair in pairs]
    return [[word[half] for word in pair] for pair in halves for half in range(2)]


def right_pairs(runs: list[list[V]]) -> list[list[V]]:
    """A lane's units of activations of a piece, 4 words each -> the right factors in `left_pairs`'s order."""
    return [run[2 * pair : 2 * pair + 2] for pair in range(2) for run in runs]


def unit_place(bits: int, unit: V) -> tuple[V, V, V]:
    """Number of a unit of activations along K -> its piece, the part of the lanes that read it, and which of their
    runs it is."""
    runs = RUNS[bits]
    return unit // (4 * runs), unit // runs % 4, unit % runs  # type: ignore[operator]


def lds_slot(height: int, token: V, part: V, run: V) -> V:
    """Where 16 bytes of activations stand among those of `height` tokens, 16 or 4, that the lanes of a wave read at
    once. run: the unit's, or for INT8 its piece.

    Neighbouring threads write units of one token, so its number is turned by the unit's: any 8 lanes that the LDS
    serves at once then write to all of its 32 banks, and none reads another's bank.
    """
    odd = run % 2  # type: ignore[operator]
    turned = part * 2 + odd if height == ROWS else odd * 2 + part // 2  # type: ignore[operator]
    return part * height + (token ^ turned)  # type: ignore[operator]
