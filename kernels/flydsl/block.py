"""The activations of one block of pairs in a product's kernel."""

# FlyDSL traces these functions; its values are typed for its compiler.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportFunctionMemberAccess=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import flydsl.expr as fx
from flydsl.expr import gpu, rocdl
from flydsl.expr.typing import Vector

from . import wave_maps as maps
from .lane_values import as_words, elements, four_words, load_quad, load_word
from .shape import NOWHERE, QUAD, THREADS, WAVES


class Block:
    """The activations of one block of pairs: which they are, and their way through LDS."""

    def __init__(self, shape, x, pair_row, order, pairs, x_bytes, thread, block) -> None:
        self._shape, self._pairs, self._order, self._pair_row = shape, pairs, order, pair_row
        self._first = block * fx.Int32(shape.tokens)
        wave, lane = thread // fx.Int32(maps.WAVE), thread % fx.Int32(maps.WAVE)
        self._wave, self._lane = wave, lane
        self._own = wave * fx.Int32(shape.lds_bytes // 4 // WAVES) if shape.split > 1 else fx.Int32(0)
        self._lds = fx.get_dyn_shared(fx.Int32)
        self._rows = rocdl.get_buffer_rsrc(rocdl.make_buffer_ptr(fx.get_iter(x), x_bytes))
        first, step = (lane, maps.WAVE) if shape.split > 1 else (thread, THREADS)
        self._brought = [self._bring(first + fx.Int32(load * step)) for load in range(shape.loads)]
        # A wave's lanes read their units of even and of odd runs.
        part, token = maps.lane_part(lane), maps.lane_row(lane) % fx.Int32(shape.height)
        slots = [maps.lds_slot(shape.height, token, part, fx.Int32(odd)) for odd in range(2)]
        self._read = [self._own + slot * fx.Int32(maps.LANE_WORDS) for slot in slots]

    def pair(self, place):
        """Place in the block -> the pair there, and whether there is one."""
        pair = load_word(self._order, self._first + place)
        return pair, pair < self._pairs

    def source(self, pair):
        """Pair -> its row of x."""
        return load_word(self._pair_row, pair) if self._shape.gated else pair

    def _bring(self, number):
        """What a thread brings to LDS: its byte in the first turn, and the word where it goes."""
        shape = self._shape
        token, unit = number // fx.Int32(shape.token_units), number % fx.Int32(shape.token_units)
        pair, used = self.pair(token)
        source = self.source(used.select(pair, fx.Int32(0)))
        begin = source * fx.Int32(shape.inner) + unit * fx.Int32(maps.LANE_BYTES)
        if shape.split > 1:
            begin = begin + self._wave * fx.Int32(shape.token_units * maps.LANE_BYTES)
        piece, part, run = maps.unit_place(shape.bits, unit)
        slot = maps.lds_slot(shape.height, token % fx.Int32(shape.height), part, run if shape.runs > 1 else piece)
        place = self._run(piece, token // fx.Int32(shape.height), run) + slot * fx.Int32(maps.LANE_WORDS)
        return used.select(begin, fx.Int32(NOWHERE)), self._own + place

    def _run(self, piece, token_tile, run):
        """The word where a run of a piece of a tile begins in a buffer."""
        shape = self._shape
        return ((piece * shape.token_tiles + token_tile) * shape.runs + run) * shape.run_words

    def load(self, body, turn: int) -> list[Vector]:
        """A thread's units of a turn; zeros where the block has no pair, and beyond the last turn."""
        shape = self._shape
        step = shape.token_units * maps.LANE_BYTES * shape.split
        begin = body * fx.Int32(step * shape.turns) + fx.Int32(step * turn)
        begin = (body < fx.Int32(shape.bodies)).select(begin, fx.Int32(NOWHERE))
        return [as_words(load_quad(self._rows, first + begin)) for first, _ in self._brought]

    def keep(self, found: list[Vector], turn: int) -> None:
        """Puts what `load` gave into the buffer of its turn."""
        for vector, (_, place) in zip(found, self._brought, strict=True):
            fx.ptr_store(vector, self._lds + (place + fx.Int32(self._buffer(turn))))

    def factors(self, piece: int, turn: int) -> list[list[list[fx.Int32]]]:
        """The right factors of a piece, by 16 tokens."""
        shape, found = self._shape, []
        for token_tile in range(shape.token_tiles):
            runs = []
            for run in range(shape.runs):
                base = self._read[run if shape.runs > 1 else piece % 2]
                at = base + fx.Int32(self._buffer(turn) + self._run(piece, token_tile, run))
                runs.append(elements(as_words(fx.ptr_load(self._lds + at, result_type=four_words()))))
            found.append(maps.right_pairs(runs))
        return found

    def summed(self, totals: list[Vector]) -> list[Vector]:
        """The sums of all waves that share a unit."""
        shape = self._shape
        if shape.split == 1:
            return totals
        at = self._lane * fx.Int32(maps.LANE_WORDS)
        for number, total in enumerate(totals):
            fx.ptr_store(total, self._lds + (self._own + at + fx.Int32(number * QUAD)))
        gpu.barrier()
        found = []
        for number in range(len(totals)):
            parts = [wave * (shape.lds_bytes // 4 // WAVES) + number * QUAD for wave in range(shape.split)]
            loaded = [
                as_words(fx.ptr_load(self._lds + (at + fx.Int32(part)), result_type=four_words())) for part in parts
            ]
            found.append(loaded[0] + loaded[1] + loaded[2] + loaded[3])
        return found

    def writes(self, lane, wave):
        """Whether a lane has results of its own: one wave's of those that share a unit, and of the block's tokens."""
        if self._shape.split == 1:
            return lane >= fx.Int32(0)
        return (wave == fx.Int32(0)) & (maps.lane_row(lane) < fx.Int32(self._shape.height))

    def _buffer(self, turn: int) -> int:
        return turn % 2 * self._shape.buffer_words if self._shape.split == 1 else 0
