"""One kernel: a tile of rows of an expert's matrix times a block of its activations, with the epilogue fused.

A program has 4 waves; each multiplies 32 rows of weights, which only it reads, with the same activations, which all
four share in LDS, two buffers in turns. The weights of the next chunk of K are on their way while this one is
multiplied. Sums are exact integers; the epilogue rounds as the reference does.
"""

# FlyDSL traces these functions; its values are typed for its compiler.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportFunctionMemberAccess=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import flydsl.compiler as flyc
import flydsl.expr as fx
from flydsl._mlir import ir
from flydsl._mlir.dialects import llvm
from flydsl.expr import gpu, range_constexpr, rocdl
from flydsl.expr.typing import Vector

from ..ordered import EXP_COEFFICIENTS, EXP_MAX, EXP_MIN, LN2_HIGH, LN2_LOW, LOG2_E, ROUND_MAGIC, ROUND_MAGIC_BITS
from . import wave_maps as maps
from .layout import WAVES
from .shape import QUAD, ProductShape

_THREADS = WAVES * maps.WAVE
_NOWHERE = -1  # as an unsigned byte beyond any buffer: what is loaded from there is zero


def _multiply_add(x: fx.Int32, factor: fx.Int32, added: fx.Int32) -> fx.Int32:
    """`v_pk_mad_u16`, for which there is no operation: factor and added by their low half in both halves."""
    operands = [fx.Int32(each).ir_value() for each in (x, factor, added)]
    word = ir.IntegerType.get_signless(32)
    text = "v_pk_mad_u16 $0, $1, $2, $3 op_sel_hi:[1,0,0]"
    return fx.Int32(llvm.inline_asm(word, operands, text, "=v,v,v,v", has_side_effects=False))


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


class _Block:
    """The activations of one block of pairs: which they are, and their way through LDS."""

    def __init__(self, shape, x, pair_row, order, pairs, x_bytes, thread, block) -> None:
        self._shape, self._pairs, self._order, self._pair_row = shape, pairs, order, pair_row
        self._first = block * fx.Int32(shape.tokens)
        self._lds = fx.get_dyn_shared(fx.Int32)
        self._rows = rocdl.get_buffer_rsrc(rocdl.make_buffer_ptr(fx.get_iter(x), x_bytes))
        loads = shape.tokens * shape.chunk * 4 // _THREADS
        self._brought = [self._bring(thread + fx.Int32(load * _THREADS)) for load in range(loads)]

    def pair(self, place):
        """Place in the block -> the pair there, and whether there is one."""
        pair = _load(self._order, self._first + place)
        return pair, pair < self._pairs

    def source(self, pair):
        """Pair -> its row of x."""
        return _load(self._pair_row, pair) if self._shape.gated else pair

    def _bring(self, number):
        """What a thread brings to LDS: whether there is a row, its byte where it begins, and the word where it goes."""
        shape = self._shape
        token, part = number // fx.Int32(shape.chunk * 4), number % fx.Int32(shape.chunk * 4)
        pair, used = self.pair(token)
        source = self.source(used.select(pair, fx.Int32(0)))
        begin = source * fx.Int32(shape.inner) + part * fx.Int32(maps.LANE_VALUES[shape.bits])
        piece, token_tile = part // fx.Int32(4), token // fx.Int32(maps.ROWS)
        place = (piece * fx.Int32(shape.token_tiles) + token_tile) * fx.Int32(shape.runs * QUAD)
        reader = part % fx.Int32(4) * fx.Int32(maps.ROWS) + maps.lane_row(token)
        return used, begin, place + reader * fx.Int32(maps.LANE_WORDS)

    def load(self, turn) -> list[Vector]:
        """A thread's runs of chunk number `turn`; zeros where the block has no pair."""
        shape, found = self._shape, []
        step = turn * fx.Int32(shape.chunk * 4 * maps.LANE_VALUES[shape.bits])
        for used, begin, _ in self._brought:
            for run in range(shape.runs):
                byte = used.select(begin + step + fx.Int32(16 * run), fx.Int32(_NOWHERE))
                found.append(_words(rocdl.raw_ptr_buffer_load(_four(), self._rows, byte, fx.Int32(0))))
        return found

    def keep(self, found: list[Vector], turn) -> None:
        """Puts what `load` gave into the buffer of its turn."""
        base, runs = self._buffer(turn), self._shape.runs
        for load, (_, _, place) in enumerate(self._brought):
            spread = [_elements(each) for each in found[load * runs : (load + 1) * runs]]
            if runs == 2:
                spread = maps.activation_words(spread[0], spread[1])
            for run, values in enumerate(spread):
                vector = Vector.from_elements(values, fx.Int32)
                fx.ptr_store(vector, self._lds + (base + place + fx.Int32(run * QUAD)))

    def factors(self, piece: int, turn, lane) -> list[list[Vector]]:
        """The right factors of a piece: of every 16 tokens their runs."""
        shape = self._shape
        base = self._buffer(turn) + lane * fx.Int32(maps.LANE_WORDS)
        return [
            [
                _words(self._quad(base + fx.Int32(((piece * shape.token_tiles + tokens) * shape.runs + run) * QUAD)))
                for run in range(shape.runs)
            ]
            for tokens in range(shape.token_tiles)
        ]

    def _quad(self, at):
        return fx.ptr_load(self._lds + at, result_type=_four())

    def _buffer(self, turn):
        return turn % fx.Int32(2) * fx.Int32(self._shape.chunk_words)


class _Unit:
    """The weights of one wave: 32 rows of one expert."""

    def __init__(self, shape, words, multipliers, scale, expert, unit, lane) -> None:
        self._shape, self._lane, self._scale = shape, lane, scale
        self._tile = (expert * fx.Int32(shape.units) + unit) * fx.Int32(maps.TILES)
        # An expert matrix of all experts has more than 2^31 bytes.
        self._words = fx.get_iter(words) + fx.Int64(self._tile) * fx.Int64(shape.tile_words)
        self._multipliers = fx.get_iter(multipliers) + fx.Int64(self._tile) * fx.Int64(shape.multiplier_words)

    def load(self, turn) -> list[Vector]:
        """A lane's weights of chunk number `turn`: of both tiles, piece by piece."""
        shape = self._shape
        at = self._words + (turn * fx.Int32(shape.chunk * QUAD) + self._lane * fx.Int32(maps.LANE_WORDS))
        steps = [tile * shape.tile_words + piece * QUAD for tile in range(maps.TILES) for piece in range(shape.chunk)]
        return [_words(fx.ptr_load(at + fx.Int32(step), result_type=_four())) for step in steps]

    def load_multipliers(self, turn) -> list[fx.Int32]:
        """A lane's multipliers of both tiles for that chunk, the first in the lowest bits; none for INT8."""
        shape = self._shape
        if shape.bits == 8:
            return []
        first = turn * fx.Int32(shape.chunk)
        at = self._multipliers + (first // fx.Int32(4) * fx.Int32(maps.WAVE) + self._lane)
        shift = first % fx.Int32(4) * fx.Int32(4)
        tiles = [fx.ptr_load(at + fx.Int32(tile * shape.multiplier_words)) for tile in range(maps.TILES)]
        return [fx.Int32(fx.Uint16(each)) >> shift for each in tiles]

    def left(self, words: Vector, packed: fx.Int32 | None, piece: int) -> list[fx.Int32]:
        """A lane's words of one piece as bytes, in the order of the instructions that multiply them."""
        if packed is None:
            return _elements(words)
        factor = maps.multiplier(packed, piece)
        added = maps.offset(factor)
        return [each for word in _elements(words) for each in maps.unpacked(word, factor, added, _multiply_add)]

    def scales(self, tile: int) -> list[fx.Float32]:
        """Of the rows that a lane's results have."""
        at = (self._tile + fx.Int32(tile)) * fx.Int32(maps.ROWS) + maps.result_row(self._lane, 0)
        four = Vector(fx.ptr_load(fx.get_iter(self._scale) + at, result_type=Vector.make_type(4, fx.Float32)))
        return [fx.Float32(four[i]) for i in range(4)]


def _multiply(shape, unit, block, weights, packed, totals, turn, lane) -> list[Vector]:
    """totals, of every tile and every 16 tokens, plus the products of a chunk."""
    totals = list(totals)
    for piece in range(shape.chunk):
        right = block.factors(piece, turn, lane)
        for tile in range(maps.TILES):
            left = unit.left(weights[tile * shape.chunk + piece], packed[tile] if packed else None, piece)
            for step in range(len(left) // 2):
                for tokens, runs in enumerate(right):
                    two = [runs[step // 2][step % 2 * 2 + i] for i in range(2)]
                    number = tile * shape.token_tiles + tokens
                    totals[number] = _matrix(left[2 * step : 2 * step + 2], two, totals[number])
    return totals


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
    order, block_expert: of blocks of `shape.tokens` pairs. out: [P, rows] float32.
    """
    chunks = shape.pieces // shape.chunk
    sums, quads = maps.TILES * shape.token_tiles, maps.TILES * shape.chunk
    others = quads + (maps.TILES if shape.bits == 4 else 0)

    @flyc.kernel
    def expert_product(
        words: fx.Tensor, multipliers: fx.Tensor, scale: fx.Tensor, x: fx.Tensor, x_scale: fx.Tensor,
        pair_row: fx.Tensor, order: fx.Tensor, block_expert: fx.Tensor, out: fx.Tensor,
        pairs: fx.Int32, x_bytes: fx.Int64,
    ):  # fmt: skip
        thread = fx.thread_idx.x
        lane = thread % fx.Int32(maps.WAVE)
        number = fx.block_idx.x * fx.Int32(WAVES) + thread // fx.Int32(maps.WAVE)
        expert = _load(block_expert, fx.block_idx.y)  # -1 of a block that is not used
        block = _Block(shape, x, pair_row, order, pairs, x_bytes, thread, fx.block_idx.y)
        unit = _Unit(shape, words, multipliers, scale, fx.max(expert, fx.Int32(0)), number, lane)
        turns = (expert < fx.Int32(0)).select(fx.Int32(0), fx.Int32(chunks))
        zero, start = Vector.filled(4, 0, fx.Int32), fx.Int32(0)
        init = [zero] * sums + unit.load(start) + unit.load_multipliers(start) + block.load(start)
        for turn, state in range(0, turns, 1, init=init):
            now = fx.Int32(turn)
            totals, weights = _vectors(state[:sums]), _vectors(state[sums : sums + quads])
            packed = [fx.Int32(each) for each in state[sums + quads : sums + others]]
            block.keep(_vectors(state[sums + others :]), now)
            gpu.barrier()
            following = fx.min(now + fx.Int32(1), fx.Int32(chunks - 1))
            ahead = unit.load(following) + unit.load_multipliers(following) + block.load(following)
            results = yield _multiply(shape, unit, block, weights, packed, totals, now, lane) + ahead
        for tokens in range_constexpr(shape.token_tiles):
            pair, used = block.pair(fx.Int32(tokens * maps.ROWS) + maps.lane_row(lane))
            kept = used.select(pair, fx.Int32(0))
            row_scale = fx.Float32(fx.ptr_load(fx.get_iter(x_scale) + block.source(kept)))
            values = _results(shape, unit, _vectors(results[:sums]), tokens, row_scale)
            for tile in range_constexpr(len(values)):
                row = (number * fx.Int32(len(values)) + fx.Int32(tile)) * fx.Int32(maps.ROWS) + maps.result_row(lane, 0)
                at = fx.get_iter(out) + (fx.Int64(kept) * fx.Int64(shape.rows) + fx.Int64(row))
                if used & (row < fx.Int32(shape.rows)):
                    fx.ptr_store(Vector.from_elements(values[tile], fx.Float32), at)

    @flyc.jit
    def launch(
        words: fx.Tensor, multipliers: fx.Tensor, scale: fx.Tensor, x: fx.Tensor, x_scale: fx.Tensor,
        pair_row: fx.Tensor, order: fx.Tensor, block_expert: fx.Tensor, out: fx.Tensor,
        pairs: fx.Int32, x_bytes: fx.Int64, blocks: fx.Int32, stream: fx.Stream = fx.Stream(None),
    ):  # fmt: skip
        grid = (shape.units // WAVES, blocks, 1)
        expert_product(
            words, multipliers, scale, x, x_scale, pair_row, order, block_expert, out, pairs, x_bytes
        ).launch(grid=grid, block=(_THREADS, 1, 1), smem=shape.lds_bytes, stream=stream)  # fmt: skip

    return launch


def _load(tensor, at):
    """One int32."""
    return fx.Int32(fx.ptr_load(fx.get_iter(tensor) + at))


def _four():
    return Vector.make_type(4, fx.Int32)


def _words(value) -> Vector:
    return Vector(value, (4,), fx.Int32)


def _vectors(values) -> list[Vector]:
    return [_words(each) for each in values]


def _elements(vector: Vector) -> list[fx.Int32]:
    return [fx.Int32(vector[i]) for i in range(4)]


__all__ = ["product_launcher"]
