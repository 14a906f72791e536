"""The weights of one wave in a product's kernel."""

# FlyDSL traces these functions; its values are typed for its compiler.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportFunctionMemberAccess=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from functools import partial

import flydsl.expr as fx
from flydsl._mlir import ir
from flydsl.expr import rocdl
from flydsl.expr.typing import Vector

from . import wave_maps as maps
from .lane_values import as_words, elements, load_quad, multiply_add


class Unit:
    """The weights of one wave: 32 rows of one expert, or a part of their K."""

    def __init__(self, shape, words, multipliers, scale, expert, known, unit, wave, lane) -> None:
        self._shape, self._lane, self._scale, self._known = shape, lane, scale, known
        self._tile = (known.select(expert, fx.Int32(0)) * fx.Int32(shape.units) + unit) * fx.Int32(maps.TILES)
        self._wave = wave if shape.split > 1 else fx.Int32(0)
        self._tiles = [self._buffer(words, tile, shape.tile_words, 4) for tile in range(maps.TILES)]
        if shape.bits == 4:
            self._multipliers = [
                self._buffer(multipliers, tile, shape.multiplier_words, 2) for tile in range(maps.TILES)
            ]

    def _buffer(self, tensor, tile: int, size: int, width: int):
        """One tile's part of a tensor, or nothing for no expert: what is loaded beyond it is zero, and is not read."""
        # An expert matrix of all experts has more than 2^31 bytes.
        at = fx.get_iter(tensor) + fx.Int64(self._tile + fx.Int32(tile)) * fx.Int64(size)
        end = self._known.select(fx.Int32(size * width), fx.Int32(0))
        return rocdl.get_buffer_rsrc(rocdl.make_buffer_ptr(at, fx.Int64(end)))

    def load(self, body, piece: int) -> list[Vector]:
        """A lane's weights of one piece of a run of the loop's body, of both tiles."""
        shape = self._shape
        first = self._part(body) * fx.Int32(shape.ahead * maps.WAVE) + self._lane
        at = first * fx.Int32(maps.LANE_BYTES) + fx.Int32(piece * maps.WAVE * maps.LANE_BYTES)
        return [as_words(load_quad(tile, at)) for tile in self._tiles]

    def load_multipliers(self, body) -> list[fx.Int32]:
        """A lane's multipliers for a run of the body, 4 pieces a word, of one tile and of the other; none for INT8."""
        shape = self._shape
        if shape.bits == 8:
            return []
        words, short = shape.ahead // maps.PACKED, ir.IntegerType.get_signless(16)
        first = (self._part(body) * fx.Int32(words * maps.WAVE) + self._lane) * fx.Int32(2)
        places = [(tile, first + fx.Int32(word * 2 * maps.WAVE)) for tile in self._multipliers for word in range(words)]
        return [fx.Int32(fx.Uint16(rocdl.raw_ptr_buffer_load(short, tile, at, fx.Int32(0)))) for tile, at in places]

    def left(self, words: Vector, packed: list[fx.Int32], tile: int, piece: int) -> list[list[fx.Int32]]:
        """A lane's words of one piece as bytes, as the instructions take them."""
        shape, unpack = self._shape, None
        if shape.bits == 4:
            number = tile * (shape.ahead // maps.PACKED) + piece // maps.PACKED
            factor = maps.multiplier(packed[number], piece)
            added = maps.offset(factor)
            unpack = partial(maps.unpacked, factor=factor, added=added, multiply_add=multiply_add)
        return maps.left_pairs(elements(words), unpack)

    def scales(self, tile: int) -> list[fx.Float32]:
        """Of the rows that a lane's results have."""
        at = (self._tile + fx.Int32(tile)) * fx.Int32(maps.ROWS) + maps.result_row(self._lane, 0)
        four = Vector(fx.ptr_load(fx.get_iter(self._scale) + at, result_type=Vector.make_type(4, fx.Float32)))
        return [fx.Float32(four[i]) for i in range(4)]

    def _part(self, body):
        """Which part of K a wave has in a run of the body."""
        return body * fx.Int32(self._shape.split) + self._wave
