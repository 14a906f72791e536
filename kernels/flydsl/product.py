"""One kernel: a tile of rows of an expert's matrix times a block of its activations, with the epilogue fused.

A program has 4 waves. Each multiplies 32 rows of weights, which only it reads, with the same activations, which all
four share in LDS, two buffers in turns; for few tokens they share the rows instead, each has its own part of K, and
nobody waits for another before the sums are added. Weights come straight into registers and are replaced by those of
the loop's next run as soon as they are used. Sums are exact integers; the epilogue rounds as the reference does.
"""

# FlyDSL traces these functions; its values are typed for its compiler.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportFunctionMemberAccess=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from functools import partial

import flydsl.compiler as flyc
import flydsl.expr as fx
from flydsl._mlir import ir
from flydsl.expr import gpu, range_constexpr, rocdl
from flydsl.expr.typing import Vector

from ..ordered import EXP_COEFFICIENTS, EXP_MAX, EXP_MIN, LN2_HIGH, LN2_LOW, LOG2_E, ROUND_MAGIC, ROUND_MAGIC_BITS
from . import wave_maps as maps
from .shape import QUAD, WAVES, ProductShape

_THREADS = WAVES * maps.WAVE
_MATRIX, _VECTOR, _READS = 0x8, 0x7, 0x100  # kinds of instructions, as the compiler's scheduler counts them
_NOWHERE = 0x60000000  # a byte beyond any buffer, also twice: what is loaded from there is zero, and is not read


def _multiply_add(x: fx.Int32, factor: fx.Int32, added: fx.Int32) -> fx.Int32:
    """`v_pk_mad_u16`: factor and added by their low half in both halves."""
    halves = Vector.from_elements([fx.Int32(x)], fx.Int32).bitcast(fx.Int16)
    factors, offsets = (Vector.filled(2, fx.Int32(each).to(fx.Int16), fx.Int16) for each in (factor, added))
    return fx.Int32((halves * factors + offsets).bitcast(fx.Int32)[0])


def _matrix(left: list, right: list, total: Vector) -> Vector:
    """total + 16 rows by 16 tokens of 32 values of K: two words of bytes a lane of each factor."""
    pairs = [Vector.from_elements(words, fx.Int32).bitcast(fx.Int64)[0].ir_value() for words in (left, right)]
    return _words(rocdl.mfma_i32_16x16x32_i8(_four(), [*pairs, total.ir_value(), 0, 0, 0]))


def _exp(x: fx.Float32) -> fx.Float32:
    """`kernels.ordered.ordered_exp`."""
    x = fx.min(fx.max(x, fx.Float32(EXP_MIN)), fx.Float32(EXP_MAX))
    shifted = x * fx.Float32(LOG2_E) + fx.Float32(ROUND_MAGIC)
    n = shifted - fx.Float32(ROUND_MAGIC)
    r = x - n * fx.Float32(LN2_HIGH)
    r = r - n * fx.Float32(LN2_LOW)
    y = fx.Float32(EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        y = y * r + fx.Float32(coefficient)
    y = y * r * r + r + fx.Float32(1.0)
    power = (shifted.bitcast(fx.Int32) - fx.Int32(ROUND_MAGIC_BITS - 127)) << fx.Int32(23)
    return y * power.bitcast(fx.Float32)


def _silu(x: fx.Float32) -> fx.Float32:
    """`kernels.ordered.ordered_silu`."""
    return x / (_exp(fx.Float32(0.0) - x) + fx.Float32(1.0))


def _keep_order(shape) -> None:
    """The compiler moves no load from global memory and no write to LDS across; and no unpacking where no barrier
    holds it back, for it would do all of a loop's at once and run out of registers."""
    rocdl.sched_barrier(_MATRIX | _READS | (_VECTOR if shape.split == 1 else 0))


class _Block:
    """The activations of one block of pairs: which they are, and their way through LDS."""

    def __init__(self, shape, x, pair_row, order, pairs, x_bytes, thread, block) -> None:
        self._shape, self._pairs, self._order, self._pair_row = shape, pairs, order, pair_row
        self._first = block * fx.Int32(shape.tokens)
        wave, lane = thread // fx.Int32(maps.WAVE), thread % fx.Int32(maps.WAVE)
        self._wave, self._lane = wave, lane
        self._own = wave * fx.Int32(shape.lds_bytes // 4 // WAVES) if shape.split > 1 else fx.Int32(0)
        self._lds = fx.get_dyn_shared(fx.Int32)
        self._rows = rocdl.get_buffer_rsrc(rocdl.make_buffer_ptr(fx.get_iter(x), x_bytes))
        first, step = (lane, maps.WAVE) if shape.split > 1 else (thread, _THREADS)
        self._brought = [self._bring(first + fx.Int32(load * step)) for load in range(shape.loads)]
        # A wave's lanes read their units of even and of odd runs.
        part, token = maps.lane_part(lane), maps.lane_row(lane) % fx.Int32(shape.height)
        slots = [maps.lds_slot(shape.height, token, part, fx.Int32(odd)) for odd in range(2)]
        self._read = [self._own + slot * fx.Int32(maps.LANE_WORDS) for slot in slots]

    def pair(self, place):
        """Place in the block -> the pair there, and whether there is one."""
        pair = _load(self._order, self._first + place)
        return pair, pair < self._pairs

    def source(self, pair):
        """Pair -> its row of x."""
        return _load(self._pair_row, pair) if self._shape.gated else pair

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
        return used.select(begin, fx.Int32(_NOWHERE)), self._own + place

    def _run(self, piece, token_tile, run):
        """The word where a run of a piece of a tile begins in a buffer."""
        shape = self._shape
        return ((piece * shape.token_tiles + token_tile) * shape.runs + run) * shape.run_words

    def load(self, body, turn: int) -> list[Vector]:
        """A thread's units of a turn; zeros where the block has no pair, and beyond the last turn."""
        shape = self._shape
        step = shape.token_units * maps.LANE_BYTES * shape.split
        begin = body * fx.Int32(step * shape.turns) + fx.Int32(step * turn)
        begin = (body < fx.Int32(shape.bodies)).select(begin, fx.Int32(_NOWHERE))
        return [_words(_quad(self._rows, first + begin)) for first, _ in self._brought]

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
                runs.append(_elements(_words(fx.ptr_load(self._lds + at, result_type=_four()))))
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
            loaded = [_words(fx.ptr_load(self._lds + (at + fx.Int32(part)), result_type=_four())) for part in parts]
            found.append(loaded[0] + loaded[1] + loaded[2] + loaded[3])
        return found

    def writes(self, lane, wave):
        """Whether a lane has results of its own: one wave's of those that share a unit, and of the block's tokens."""
        if self._shape.split == 1:
            return lane >= fx.Int32(0)
        return (wave == fx.Int32(0)) & (maps.lane_row(lane) < fx.Int32(self._shape.height))

    def _buffer(self, turn: int) -> int:
        return turn % 2 * self._shape.buffer_words if self._shape.split == 1 else 0


class _Unit:
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
        return [_words(_quad(tile, at)) for tile in self._tiles]

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
            unpack = partial(maps.unpacked, factor=factor, added=added, multiply_add=_multiply_add)
        return maps.left_pairs(_elements(words), unpack)

    def scales(self, tile: int) -> list[fx.Float32]:
        """Of the rows that a lane's results have."""
        at = (self._tile + fx.Int32(tile)) * fx.Int32(maps.ROWS) + maps.result_row(self._lane, 0)
        four = Vector(fx.ptr_load(fx.get_iter(self._scale) + at, result_type=Vector.make_type(4, fx.Float32)))
        return [fx.Float32(four[i]) for i in range(4)]

    def _part(self, body):
        """Which part of K a wave has in a run of the body."""
        return body * fx.Int32(self._shape.split) + self._wave


class _State:
    """What the loop carries on: sums, weights and multipliers of a run of its body, activations of its first turn."""

    def __init__(self, shape, values) -> None:
        sums, quads = maps.TILES * shape.token_tiles, maps.TILES * shape.ahead
        packed = maps.TILES * (shape.ahead // maps.PACKED) if shape.bits == 4 else 0
        self.totals = _vectors(values[:sums])
        self.weights = _vectors(values[sums : sums + quads])
        self.packed = [fx.Int32(each) for each in values[sums + quads : sums + quads + packed]]
        self.rows = _vectors(values[sums + quads + packed :])

    def values(self) -> list:
        return [*self.totals, *self.weights, *self.packed, *self.rows]


def _first_state(shape, unit: _Unit, block: _Block) -> _State:
    """Loads in the order in which the loop's body leaves them on their way, so that it waits for no younger one."""
    start, weights = fx.Int32(0), []
    packed = unit.load_multipliers(start)
    for piece in range(shape.ahead):
        if piece == shape.ahead - shape.chunk:
            rows = block.load(start, 0)
            _keep_order(shape)
        weights += unit.load(start, piece)
        _keep_order(shape)
    zeros = [Vector.filled(4, 0, fx.Int32)] * (maps.TILES * shape.token_tiles)
    return _State(shape, [*zeros, *weights, *packed, *rows])


def _run_body(shape, unit: _Unit, block: _Block, state: _State, body) -> None:
    """One run of the loop's body: each piece's weights are replaced by those of the next run once they are used."""
    following = body + fx.Int32(1)
    packed = unit.load_multipliers(following)
    for turn in range(shape.turns):
        block.keep(state.rows, turn)
        if shape.split == 1:
            gpu.barrier()
        last = turn == shape.turns - 1
        state.rows = block.load(following if last else body, 0 if last else turn + 1)
        _keep_order(shape)
        for piece in range(shape.chunk):
            number = turn * shape.chunk + piece
            _multiply(shape, unit, state, number, block.factors(piece, turn))
            state.weights[maps.TILES * number : maps.TILES * (number + 1)] = unit.load(following, number)
            _keep_order(shape)
    state.packed = packed


def _multiply(shape, unit: _Unit, state: _State, piece: int, right: list[list[list[fx.Int32]]]) -> None:
    """Adds the products of a piece to the sums, of both tiles and every 16 tokens."""
    for tile in range(maps.TILES):
        left = unit.left(state.weights[maps.TILES * piece + tile], state.packed, tile, piece)
        for step, words in enumerate(left):
            for tokens, pairs in enumerate(right):
                number = tile * shape.token_tiles + tokens
                state.totals[number] = _matrix(words, pairs[step], state.totals[number])


def _results(shape, unit, totals, tokens: int, row_scale) -> list[list[fx.Float32]]:
    """The epilogue of 16 tokens: four rows a lane, of one tile of results or of two."""
    values = []
    for tile in range(maps.TILES):
        total, scales = totals[tile * shape.token_tiles + tokens], unit.scales(tile)
        values.append([fx.Float32(fx.Int32(total[i])) * row_scale * scales[i] for i in range(4)])
    return [[_silu(gate) * up for gate, up in zip(*values, strict=True)]] if shape.gated else values


def product_launcher(shape: ProductShape):
    """The product as a function of tensors and a stream, compiled at its first call.

    words, multipliers, scale: of a `WaveMatrix` (words as multipliers, where there are none). x: [T, K] int8 as int32
    words; x_scale [T] float32. pair_row [P] int32: of a gated product the row of x of every pair, else unused: row p.
    order, block_expert: of blocks of `shape.tokens` pairs; blocks of experts outside 0..experts - 1 are left out.
    out: [P, rows] float32.
    """

    @flyc.kernel
    def expert_product(
        words: fx.Tensor, multipliers: fx.Tensor, scale: fx.Tensor, x: fx.Tensor, x_scale: fx.Tensor,
        pair_row: fx.Tensor, order: fx.Tensor, block_expert: fx.Tensor, out: fx.Tensor,
        pairs: fx.Int32, experts: fx.Int32, x_bytes: fx.Int64,
    ):  # fmt: skip
        thread = fx.thread_idx.x
        lane = thread % fx.Int32(maps.WAVE)
        wave = fx.Int32(rocdl.readfirstlane(ir.IntegerType.get_signless(32), thread // fx.Int32(maps.WAVE)))
        number = fx.block_idx.x * fx.Int32(WAVES) + wave if shape.split == 1 else fx.block_idx.x
        expert = _load(block_expert, fx.block_idx.y)
        known = (expert >= fx.Int32(0)) & (expert < experts)  # else the block is not used
        block = _Block(shape, x, pair_row, order, pairs, x_bytes, thread, fx.block_idx.y)
        unit = _Unit(shape, words, multipliers, scale, expert, known, number, wave, lane)
        bodies = known.select(fx.Int32(shape.bodies), fx.Int32(0))
        init = _first_state(shape, unit, block).values()
        for body, carried in range(0, bodies, 1, init=init):
            state = _State(shape, carried)
            _run_body(shape, unit, block, state, fx.Int32(body))
            results = yield state.values()
        totals = block.summed(_vectors(results[: maps.TILES * shape.token_tiles]))
        for tokens in range_constexpr(shape.token_tiles):
            pair, used = block.pair(fx.Int32(tokens * maps.ROWS) + maps.lane_row(lane) % fx.Int32(shape.height))
            used = used & known & block.writes(lane, wave)
            kept = used.select(pair, fx.Int32(0))
            row_scale = fx.Float32(fx.ptr_load(fx.get_iter(x_scale) + block.source(kept)))
            values = _results(shape, unit, totals, tokens, row_scale)
            for tile in range_constexpr(len(values)):
                row = (number * fx.Int32(len(values)) + fx.Int32(tile)) * fx.Int32(maps.ROWS) + maps.result_row(lane, 0)
                at = fx.get_iter(out) + (fx.Int64(kept) * fx.Int64(shape.rows) + fx.Int64(row))
                if used & (row < fx.Int32(shape.rows)):
                    fx.ptr_store(Vector.from_elements(values[tile], fx.Float32), at)

    @flyc.jit
    def launch(
        words: fx.Tensor, multipliers: fx.Tensor, scale: fx.Tensor, x: fx.Tensor, x_scale: fx.Tensor,
        pair_row: fx.Tensor, order: fx.Tensor, block_expert: fx.Tensor, out: fx.Tensor,
        pairs: fx.Int32, experts: fx.Int32, x_bytes: fx.Int64, blocks: fx.Int32, stream: fx.Stream = fx.Stream(None),
    ):  # fmt: skip
        grid = (shape.programs, blocks, 1)
        expert_product(
            words, multipliers, scale, x, x_scale, pair_row, order, block_expert, out, pairs, experts, x_bytes
        ).launch(grid=grid, block=(_THREADS, 1, 1), smem=shape.lds_bytes, stream=stream)  # fmt: skip

    return launch


def _load(tensor, at):
    """One int32."""
    return fx.Int32(fx.ptr_load(fx.get_iter(tensor) + at))


def _quad(buffer, at):
    """16 bytes; zeros from beyond the buffer."""
    return rocdl.raw_ptr_buffer_load(_four(), buffer, at, fx.Int32(0))


def _four():
    return Vector.make_type(4, fx.Int32)


def _words(value) -> Vector:
    return Vector(value, (4,), fx.Int32)


def _vectors(values) -> list[Vector]:
    return [_words(each) for each in values]


def _elements(vector: Vector) -> list[fx.Int32]:
    return [fx.Int32(vector[i]) for i in range(4)]


__all__ = ["product_launcher"]
